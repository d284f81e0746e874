"""What minilora, other libraries and two classroom mistakes pass of `minilora.conformance`.

    OMP_NUM_THREADS=1 python benchmarks/conformance.py
    OMP_NUM_THREADS=1 python benchmarks/conformance.py --only torchtune   # where it is installed
    python benchmarks/conformance.py --table                              # docs/conformance.md

A library that is not installed keeps what was found where it was. Seconds are those of one whole
check on one thread: of the first, which warms up the compiler, and of the second.
"""

import importlib
import json
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from common import RESULTS, ROOT, parser, write_result
from torch import nn

import minilora
from minilora import LoRALinear, conformance

PAGE = ROOT / "docs" / "conformance.md"
MARKS = {"passed": "✓", "failed": "**✗**", "not applicable": "–"}


def injected(**config: Any) -> Any:
    """A layer of minilora as `inject` makes it."""

    def make(linear: nn.Module, rank: int, alpha: float, dropout: float) -> nn.Module:
        model = nn.ModuleDict({"layer": linear})
        settings = {"rank": rank, "alpha": alpha, "dropout": dropout, **config}
        minilora.inject(model, minilora.LoRAConfig(targets=("layer",), **settings))
        return model["layer"]

    return make


def example(name: str, **more: Any) -> dict[str, Any]:
    """What check is asked for a file of examples/conformance/."""
    module = importlib.import_module(name)
    return {**getattr(module, "layer", {"make": module.make}), **more}


def peft_dora() -> dict[str, Any]:
    """PEFT's DoRA, by the wrapper of its LoRA."""
    make = importlib.import_module("peft_layer").make
    return {
        "make": lambda *arguments: make(*arguments, use_dora=True),
        "also": ("lora_magnitude_vector.default.weight",),
        "low_rank": False,
    }


DORA = {"also": ("magnitude",), "low_rank": False}
NF4 = {"linear": lambda in_, out: minilora.NF4Linear(nn.Linear(in_, out))}

# Column of the table -> (the package whose version is noted, what check is asked).
SUBJECTS: dict[str, tuple[str, Any]] = {
    "minilora": ("minilora", lambda: {"make": LoRALinear}),
    "minilora, DoRA": ("minilora", lambda: {"make": injected(dora=True), **DORA}),
    "minilora, lora_bias": (
        "minilora",
        lambda: {"make": injected(lora_bias=True), "also": ("lora_bias",)},
    ),
    "minilora on NF4": ("minilora", lambda: {"make": LoRALinear, **NF4}),
    "PEFT": ("peft", lambda: example("peft_layer")),
    "PEFT, DoRA": ("peft", peft_dora),
    "loralib": ("loralib", lambda: example("loralib_layer")),
    "torchtune": ("torchtune", lambda: example("torchtune_layer")),
    "parametrization": ("torch", lambda: example("parametrization")),
    "student": ("torch", lambda: example("student")),
    "never learns": ("torch", lambda: example("never_learns")),
    "forgets alpha": ("torch", lambda: example("forgets_alpha")),
}


def measure(name: str) -> dict[str, Any] | None:
    """The outcomes of one subject; None where its package is missing."""
    package, ask = SUBJECTS[name]
    try:
        found, how = version(package), ask()
    except (PackageNotFoundError, ImportError) as error:
        print(f"{name}: kept as it was, {error}")
        return None
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        report = conformance.check(**how)
        seconds.append(time.perf_counter() - start)
    print(f"{name} ({package} {found}): {str(report).splitlines()[-1]}, {seconds[1]:.1f} s")
    return {
        "package": f"{package} {found}",
        "torch": torch.__version__,
        "first_seconds": round(seconds[0], 2),
        "seconds": round(seconds[1], 2),
        "results": {r.invariant: [r.outcome, r.detail] for r in report},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each invariant, a column for each subject; then what failed."""
    subjects = result["subjects"]
    invariants = list(next(iter(subjects.values()))["results"])
    rows = [["", *subjects], ["", *(s["package"] for s in subjects.values())]]
    rows += [
        [name, *(MARKS[s["results"][name][0]] for s in subjects.values())] for name in invariants
    ]
    rows.append(["seconds", *(f"{s['seconds']:.1f}" for s in subjects.values())])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"| --- |{' :---: |' * len(subjects)}")
    failed = [
        f"- {subject}, {name}: {detail.replace('<', '&lt;')}"
        for subject, found in subjects.items()
        for name, (outcome, detail) in found["results"].items()
        if outcome == "failed"
    ]
    processor = result["machine"]["processor"]
    source = (
        f"Checked {result['date']} with torch {result['machine']['torch']} on one thread of "
        f"{processor}: [results/conformance.json](../benchmarks/results/conformance.json). "
        "✓ passed, ✗ failed, – not applicable; seconds of one whole check."
    )
    return "\n".join([*lines, "", source, "", "What failed, in the kit's words:", "", *failed])


def render(page: str, result: dict[str, Any]) -> str:
    """The page with the table as the results say."""
    body = f"<!-- table: conformance -->\n{table(result)}\n<!-- end -->"
    pattern = r"<!-- table: conformance -->\n.*?<!-- end -->"
    return re.sub(pattern, lambda _: body, page, flags=re.DOTALL)


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--only", choices=SUBJECTS, nargs="+", default=list(SUBJECTS))
    flags.add_argument("--table", action="store_true", help="only write docs/conformance.md anew")
    options = flags.parse_args()
    path = RESULTS / "conformance.json"
    kept = json.loads(path.read_text()) if path.exists() else {"subjects": {}}
    if not options.table:
        sys.path.insert(0, str(ROOT / "examples" / "conformance"))
        torch.set_num_threads(1)
        now = {name: measure(name) for name in options.only}
        found = {name: now.get(name) or kept["subjects"].get(name) for name in SUBJECTS}
        write_result(
            "conformance", {"subjects": {n: f for n, f in found.items() if f}}, options.small
        )
        if options.small:
            return 0
    PAGE.write_text(render(PAGE.read_text(), json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
