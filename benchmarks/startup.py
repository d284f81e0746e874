"""How long until the command line answers: help, a typo, a hub name offline, an early Ctrl-C.

    python benchmarks/startup.py [--rounds 5]

Each contestant is a process of its own, from its start to its end. They take turns. The base is
`python -c "import torch"`: no command of minilora can answer before PyTorch is imported. An answer
may take 0.5 seconds more (`bound`), and 3 seconds in all where a network is looked for. With Ctrl-C
the time until the signal is not counted; a process that ends with a traceback, or with another exit
code than expected, ends the benchmark.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import ROOT, alternate, parser, summary, write_result

BASE = 'python -c "import torch"'
ALLOWED = 0.5  # seconds beside the base
INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)  # ended by the signal, or by the program
MINILORA = ["-m", "minilora"]  # as the installed command
TRAIN, EVALUATE = str(ROOT / "train.py"), str(ROOT / "evaluate.py")
COMMANDS: dict[str, tuple[list[str], int]] = {
    BASE: (["-c", "import torch"], 0),
    "train.py --help": ([TRAIN, "--help"], 0),
    "evaluate.py --help": ([EVALUATE, "--help"], 0),
    "train.py --rnak 8": ([TRAIN, "--rnak", "8"], 2),
    "train.py --rank eight": ([TRAIN, "--rank", "eight"], 2),
    "train.py --model nobody/nothing": ([TRAIN, "--model", "nobody/nothing"], 2),
    "minilora --help": ([*MINILORA, "--help"], 0),
    "minilora train --rnak 8": ([*MINILORA, "train", "--rnak", "8"], 2),
    "minilora predict": ([*MINILORA, "predict"], 2),
}
MOMENTS = (0.5, 1.0, 2.0, 3.0)  # seconds from the start of `train.py --rank 8` to Ctrl-C


def run(arguments: list[str], code: int) -> None:
    """One process from its start to its end."""
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    check(ended.returncode, (code,), ended.stderr)


def interrupt(program: list[str], after: float) -> float:
    """Seconds from Ctrl-C, `after` seconds into a training run, to the end of the process."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--rank", "8", "--output", str(Path(folder) / "run")]
        command = [sys.executable, *program, *flags]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        start = time.perf_counter()
        _, error = process.communicate()
        check(process.returncode, INTERRUPTED, error)
        return time.perf_counter() - start


def check(code: int, expected: tuple[int, ...], error: str) -> None:
    if code not in expected or "Traceback" in error:
        raise SystemExit(f"exit code {code} instead of {expected}:\n{error}")


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=5)
    options = flags.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    rounds, moments = (1, MOMENTS[:2]) if options.small else (options.rounds, MOMENTS)

    ends = {f"Ctrl-C after {t} s": ([TRAIN], t) for t in moments}
    ends |= {f"minilora train: Ctrl-C after {t} s": ([*MINILORA, "train"], t) for t in moments}
    stopped: dict[str, list[float]] = {name: [] for name in ends}

    def stop(name: str) -> None:
        stopped[name].append(interrupt(*ends[name]))

    contestants: dict[str, Callable[[], object]] = {
        name: partial(run, *command) for name, command in COMMANDS.items()
    }
    contestants |= {name: partial(stop, name) for name in ends}
    seconds = alternate(contestants, rounds, warmup=1)
    seconds |= {name: times[1:] for name, times in stopped.items()}
    results = summary(seconds, BASE)
    bound = results[BASE]["median_seconds"] + ALLOWED
    for name, row in results.items():
        print(f"{name:38} {row['median_seconds']:6.2f} s")
    settings = {"rounds": rounds, "bound": round(bound, 3), "allowed": ALLOWED}
    print(write_result("startup", {"settings": settings, "results": results}, options.small))


if __name__ == "__main__":
    main()
