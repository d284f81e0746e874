"""Kill a run at a random moment, resume it, and compare its end with a run that nobody touched.

    python -m tests.faults --kills 50

Two epochs with validation of a toy model, with dropout and accumulation. Most kills come from
outside at moments uniform over the run; every fourth comes from inside, before a line drawn
uniformly from all that Python executes while a checkpoint is being written, and every eighth while
validating: such moments are too short to be met by chance. Every fifth resume is killed too. Each
process is forked from one that has imported everything and computed nothing, which saves the
seconds of importing.

A kill -9 is not a power cut: what was written is in the kernel's hands and gets to the disk.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork

import torch

import minilora
from minilora.summarization import cli, commands
from minilora.summarization.training import trainer
from minilora.summarization.training.checkpoint import newest_first, read_checkpoint
from tests.helpers import SMALL, records, save_bart, save_data

PHASES = {
    "training": (commands, "fit"),
    "validating": (trainer, "validate"),
    "writing the adapter": (trainer, "save_trained"),
    "writing a checkpoint": (trainer, "save_checkpoint"),
    "evaluating": (commands, "_final_evaluation"),
}
CHECKPOINT, VALIDATION = "writing a checkpoint", "validating"
CHECKPOINTS_EVERY = 3  # steps


@dataclass
class Outcome:
    """How a forked process ended."""

    code: int | None
    """Its exit code; None if it was killed."""
    phase: str
    """What it was doing last."""
    lines: dict[str, list[int]] = field(default_factory=dict)
    """Lines executed in each writing of a checkpoint and each validation."""


class Harness:
    """A toy model, its data, and the run that nobody touches."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.random = folder, random.Random(seed)
        save_bart(folder / "bart")
        save_data(folder / "data", train=56, validation=12, test=12)
        self.whole, counted = folder / "whole", folder / "counted"
        started = time.monotonic()
        ended = self.fork(self.argv(self.whole))
        self.seconds = time.monotonic() - started
        assert ended.code == 0, self.whole.with_suffix(".out").read_text()
        self.lines = self.fork(self.argv(counted), count_lines=True).lines
        assert records(counted) == records(self.whole)

    def argv(self, output: Path) -> list[str]:
        """The command of a new run, or of its resumption where one has begun."""
        if (output / "config.json").exists():
            return ["--resume", str(output)]
        base = ["--model", str(self.folder / "bart"), "--data", str(self.folder / "data"), *SMALL]
        more = ["--checkpoint-steps", str(CHECKPOINTS_EVERY), "--output", str(output)]
        return [*base, "--rank", "3", *more]

    def trial(self, number: int) -> dict[str, Any]:
        """One run, killed once (or, in every fifth trial, twice) and resumed until it ends."""
        output = self.folder / f"run-{number}"
        inside = CHECKPOINT if number % 4 == 3 else VALIDATION if number % 8 == 1 else None
        killed = [self.kill(output, inside)]
        problems = unreadable(output)
        if number % 5 == 4 and (second := self.kill(output, None, insist=False)) is not None:
            killed.append(second)
            problems += unreadable(output)
        ended = self.fork(self.argv(output))
        assert ended.code == 0, output.with_suffix(".out").read_text()
        problems += unreadable(output)
        left = [path.name for path in output.rglob(".*")]
        return {
            "killed": killed,
            "unreadable": problems,
            "left": left,
            "adapter": same(output, self.whole, "adapter/adapter_model.safetensors"),
            "log": records(output) == records(self.whole),
            "scores": same(output, self.whole, "evaluation.json"),
        }

    def kill(self, output: Path, inside: str | None, insist: bool = True) -> str | None:
        """Begin a run or go on with it, and kill it; what it was doing, None if it ended before."""
        while True:
            if inside:
                which = self.random.randrange(len(self.lines[inside]))
                line = self.random.randrange(self.lines[inside][which])
                ended = self.fork(self.argv(output), die=(inside, which, line))
            else:
                ended = self.fork(self.argv(output), after=self.random.uniform(0, self.seconds))
            if ended.code is None:
                return ended.phase
            if not insist:
                return None
            output = output.rename(output.with_name(f"{output.name}-ended-{time.time_ns()}"))
            output = output.with_name(output.name.split("-ended-")[0])

    def fork(
        self,
        argv: list[str],
        after: float | None = None,
        die: tuple[str, int, int] | None = None,
        count_lines: bool = False,
    ) -> Outcome:
        """Run train.py in a process of its own, and kill it after so many seconds if it lives."""
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                out = os.open(Path(argv[-1]).with_suffix(".out"), os.O_CREAT | os.O_WRONLY)
                os.dup2(out, 1)
                os.dup2(out, 2)
                code = _run(argv, send, die, count_lines)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(send)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(receive, "rb") as pipe:
            said = pipe.read().decode().splitlines()
        phases = [line for line in said if ": " not in line]
        lines: dict[str, list[int]] = {}
        for phase, _, count in (line.partition(": ") for line in said if ": " in line):
            lines.setdefault(phase, []).append(int(count))
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        code = None if killed else os.waitstatus_to_exitcode(status)
        return Outcome(code, phases[-1] if phases else "opening", lines)


def _run(argv: list[str], send: int, die: tuple[str, int, int] | None, count_lines: bool) -> int:
    """In the child: say what is being done, and die where told."""
    torch.set_num_threads(1)
    times = Counter[str]()
    stack = ["opening"]

    def tell(phase: str) -> None:
        os.write(send, f"{phase}\n".encode())

    def wrap(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            stack.append(phase)
            tell(phase)
            try:
                last = die[2] if die and die[:2] == (phase, times[phase]) else None
                times[phase] += 1
                if last is not None or (count_lines and phase in (CHECKPOINT, VALIDATION)):
                    with _counting(last) as count:
                        result = function(*arguments, **more)
                    tell(f"{phase}: {count[0]}")
                    return result
                return function(*arguments, **more)
            finally:
                stack.pop()
                tell(stack[-1])

        return wrapped

    for phase, (module, name) in PHASES.items():
        setattr(module, name, wrap(phase, getattr(module, name)))
    return cli.train_main(argv)


@contextmanager
def _counting(last: int | None) -> Iterator[list[int]]:
    """Count the lines that Python executes inside the block; die before line number `last`."""
    count = [0]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            if count[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
        return trace

    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(None)


def unreadable(output: Path) -> list[str]:
    """What a reader that comes now would stumble over. What is not there yet is no fault."""
    problems = []

    def check(path: Path, read: Callable[[Path], object]) -> None:
        if path.exists():
            try:
                read(path)
            except Exception as error:
                problems.append(f"{path}: {error}")

    check(output / "adapter", minilora.read_adapter)
    for name in ("config.json", "evaluation.json"):
        check(output / name, lambda path: json.loads(path.read_bytes()))
    for path in newest_first(output / "checkpoints"):
        check(path, read_checkpoint)
    return problems


def same(one: Path, other: Path, name: str) -> bool:
    return (one / name).read_bytes() == (other / name).read_bytes()


def summary(harness: Harness, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures to publish."""
    killed = [phase for trial in trials for phase in trial["killed"]]
    return {
        "runs": len(trials),
        "kills": len(killed),
        "kills_by_phase": dict(Counter(killed).most_common()),
        "kills_inside_a_checkpoint": killed.count(CHECKPOINT),
        "resumes_killed_too": len(killed) - len(trials),
        "identical_adapters": sum(trial["adapter"] for trial in trials),
        "identical_logs": sum(trial["log"] for trial in trials),
        "identical_scores": sum(trial["scores"] for trial in trials),
        "unreadable_or_half_written": sum(len(trial["unreadable"]) for trial in trials),
        "left_behind": sum(len(trial["left"]) for trial in trials),
        "checkpoints_of_the_whole_run": len(harness.lines[CHECKPOINT]),
        "lines_of_writing_a_checkpoint": max(harness.lines[CHECKPOINT]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        harness, trials = Harness(Path(folder), arguments.seed), []
        for number in range(arguments.kills):
            trials.append(harness.trial(number))
            print(f"{number + 1:3} {trials[-1]}", flush=True)
        result = summary(harness, trials)
    print(json.dumps(result, indent=2))
    from benchmarks.common import write_result

    print(write_result("faults", result))
    identical = all(trial["adapter"] and trial["log"] and trial["scores"] for trial in trials)
    return 0 if identical and not any(t["unreadable"] or t["left"] for t in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
