"""All measurements that need a GPU, by one command and within a given number of minutes.

    python benchmarks/gpu.py --minutes 8 [--device cuda] [--out DIRECTORY]

The most important come first. Each is written to DIRECTORY/gpu_NAME.json as soon as it is done:

    tests            the tests that need CUDA, in a process of their own
    layer            benchmarks/layer.py's comparison of one q and v
    training_8, _64  a step of BART-large's dimensions at two batch sizes
    waits            lines of a step that wait for the GPU
    evaluation       summaries by the base, the adapter unmerged, and merged
    compiled         the step with compiled layers

Each part has a share of the minutes; unused time goes to the next part. A part that does not fit is
left out, with a note; an error is written in its place and does not stop the next part.

All models are in one process, since loading five would take too long. They take turns over the same
batches (the Trainer makes its own), timed by CUDA events. A contestant's memory is the allocator's
peak in its turn minus what the others hold. No data set and no network is needed: token ids are
random, with lengths distributed as SAMSum's, since time depends on nothing else.
"""

import time

BEGAN = time.monotonic()  # the import of torch counts

import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # an unpacked source tree
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import RESULTS, parser
from gpu_clock import SHARES, Run
from gpu_evaluation import evaluation
from gpu_layer import layers
from gpu_models import examples, make_bart
from gpu_tests import Tests
from gpu_training import compiled, training, waits


def main() -> None:
    flags = parser(__doc__)
    flags.set_defaults(device="cuda")
    flags.add_argument("--minutes", type=float, default=8.0, help="in all")
    flags.add_argument("--out", type=Path, default=None, help="directory; benchmarks/results")
    flags.add_argument("--parts", nargs="+", default=list(SHARES), choices=SHARES)
    options = flags.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "--device cuda: torch finds no GPU here; --device cpu tries the script", file=sys.stderr
        )
        sys.exit(2)
    small = options.small or not options.device.startswith("cuda")  # a CPU's figures say nothing
    out = options.out or (RESULTS / "small" if small else RESULTS)
    run = Run(options.device, options.minutes, out, small, start=BEGAN)
    run.left = [name for name in SHARES if name in options.parts]
    tests = Tests() if "tests" in run.left else None
    try:
        works = {"layer": lambda deadline: layers(run, deadline)}
        base = rows = None
        try:
            base = make_bart(run)
            rows = (
                examples(128, base.config.vocab_size, 0.25)
                if small
                else examples(1024, base.config.vocab_size)  # their states fit into memory
            )
        except Exception:  # then each part that needs them says so
            traceback.print_exc()
        works |= {
            "training_8": lambda deadline: training(run, base, rows, 8, deadline),
            "training_64": lambda deadline: training(
                run, base, rows, 16 if small else 64, deadline
            ),
            "waits": lambda deadline: waits(run, base, rows, deadline),
            "evaluation": lambda deadline: evaluation(run, base, rows, deadline),
            "compiled": lambda deadline: compiled(run, base, rows, deadline),
        }
        print(f"ready after {time.monotonic() - run.start:.1f} s", flush=True)
        for name in list(run.left):
            run.part(name, tests.result if tests and name == "tests" else works[name])
    finally:
        if tests is not None:
            tests.end()
    print(*(f"{name}: {state}" for name, state in run.report.items()), sep="\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
