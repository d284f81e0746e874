"""The files of a run, read and checked for the report; no model is loaded.

config.json is required. A run in progress has no end in its log.jsonl and no evaluation.json yet,
and a full fine-tune has no adapter/. A file that exists and cannot be read is an error that names
it.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from minilora import read_adapter
from minilora.arithmetic import singular_values

from ..errors import UserError
from ..evaluation import nonsense
from ..evaluation.compare import Compared, Evaluation
from ..evaluation.rouge import MEASURES, Interval
from ..files import read_object

SIDES = ("base", "finetuned", "difference")

Record = dict[str, Any]


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one module's update s B A, the largest first."""

    module: str
    shape: tuple[int, int]
    """(out, in)."""
    scale: float
    values: tuple[float, ...]
    """As many as the rank."""

    @property
    def norm(self) -> float:
        """||s B A||, the Frobenius norm."""
        return math.hypot(*self.values)

    @property
    def stable_rank(self) -> float:
        """||s B A||^2 over the square of the largest singular value: from 1 to r."""
        return (self.norm / self.values[0]) ** 2 if self.values[0] else 0.0


@dataclass(frozen=True)
class Run:
    """One run. Numbers in the records are finite, or None where they were not."""

    path: Path
    config: Record
    start: Record | None
    """trainable and total parameters."""
    steps: tuple[Record, ...]
    """step, loss (nats per target token), seconds."""
    validations: tuple[Record, ...]
    """step, epoch, loss, ROUGE."""
    end: Record | None
    """seconds and peak_bytes; None for a run in progress or stopped."""
    spectra: tuple[Spectrum, ...]
    dora: bool
    evaluation: Evaluation | None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def seconds(self) -> float:
        """Of training and validation; for a run in progress, of its steps so far."""
        if self.end is not None:
            return float(self.end["seconds"])
        return math.fsum(record["seconds"] or 0 for record in self.steps)

    @property
    def best(self) -> Record | None:
        """The validation of the saved adapter."""
        scored = [record for record in self.validations if record["rouge1"] is not None]
        return max(scored, key=lambda record: record["rouge1"], default=None)


def read_report(directory: Path) -> Run:
    """Read a run for the report.

    Raises:
        UserError: it is not a run, or one of its files is damaged; the file is named.
        LoRAError: its adapter is damaged.
        OSError: a file cannot be read.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    config = read_object(directory / "config.json")
    if config is None:
        raise UserError(f"{directory} is not a run: it has no config.json")
    kinds: dict[str, list[Record]] = {kind: [] for kind in LOG_KEYS}
    for record in _log(directory / "log.jsonl"):
        kinds.get(record["kind"], []).append(record)
    dora, spectra = _spectra(directory / "adapter")
    return Run(
        path=directory,
        config=config,
        start=next(reversed(kinds["start"]), None),
        steps=tuple(kinds["step"]),
        validations=tuple(kinds["validation"]),
        end=next(reversed(kinds["end"]), None),
        spectra=spectra,
        dora=dora,
        evaluation=_evaluation(directory / "evaluation.json"),
    )


# The keys of each kind of record. Those in parentheses may be null, which stands for NaN.
LOG_KEYS = {
    "start": "trainable total",
    "step": "step (loss) (seconds)",
    "validation": "step epoch (loss) (rouge1) (rouge2) (rougeL)",
    "end": "seconds peak_bytes",
}


def _log(path: Path) -> Iterator[Record]:
    """The records; unknown kinds are ignored."""
    if not path.exists():
        return
    *lines, _ = path.read_bytes().split(b"\n")  # a killed run ends in an incomplete line
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: cannot be read as JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise UserError(f"{where}: is not a record")
        for key in LOG_KEYS.get(record["kind"], "").split():
            name = key.strip("()")
            if record.get(name) is not None or name == key:
                _number(record, name, where)
            record.setdefault(name, None)
        yield record


def _number(record: Any, key: str | int, where: str) -> float:
    try:
        value = record[key]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{where}: has no {key}") from None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:  # NaN too, and an int beyond floats
        raise UserError(f"{where}: {key} is {value!r:.40}, not a finite number")
    return cast(float, value)


def _evaluation(path: Path) -> Evaluation | None:
    content = read_object(path)
    if content is None:
        return None
    examples = content.get("examples")
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{path}: has no examples")
    compared = [_compared(e, f"{path}: examples[{i}]") for i, e in enumerate(examples)]
    return Evaluation(
        data=str(content.get("data", "")),
        split=str(content.get("split", "")),
        generation={},
        intervals={s: {m: _interval(content, s, m, path) for m in MEASURES} for s in SIDES},
        examples=compared,
        nonsense=None if "reference" not in content else {
            side: {kind: _interval(content, side, kind, path) for kind in nonsense.MEASURES}
            for side in ("base", "finetuned", "reference")
        },
    )  # fmt: skip


def _compared(example: Any, where: str) -> Compared:
    if not isinstance(example, dict):
        raise UserError(f"{where} is not an object")
    for field in fields(Compared):
        if field.type is float:
            _number(example, field.name, where)
        elif not isinstance(example.get(field.name), str):
            raise UserError(f"{where}: {field.name} is not a text")
    return Compared(**{field.name: example[field.name] for field in fields(Compared)})


def _interval(content: Record, side: str, measure: str, path: Path) -> Interval:
    """evaluation.json has the means of base and fine-tuned apart from their intervals."""
    intervals = content.get("intervals")
    row = intervals.get(side) if isinstance(intervals, dict) else None
    found = row.get(measure) if isinstance(row, dict) else None
    where = f"{path}: intervals, {side}, {measure}"
    bounds = [_number(found, i, where) for i in range(3 if side == "difference" else 2)]
    if side == "difference":
        return Interval(*bounds)
    return Interval(_number(content.get(side), measure, f"{path}: {side}"), *bounds)


def _spectra(directory: Path) -> tuple[bool, tuple[Spectrum, ...]]:
    """Of every module of the adapter, from A and B: the product (out, in) is never computed."""
    if not directory.exists():
        return False, ()
    adapter = read_adapter(directory)
    found = []
    for module in adapter.modules:
        A, B = (tensor.double() for tensor in adapter.pair(module))
        scale = adapter.scale_of(module)
        values = (abs(scale) * singular_values(A, B)).tolist()
        found.append(Spectrum(module, (B.shape[0], A.shape[1]), scale, tuple(values)))
    return adapter.config.dora, tuple(found)
