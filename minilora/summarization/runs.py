"""A run as its files tell it: what the report shows, read and checked, with no model in memory.

config.json must be there. A run that is under way has no end in its log.jsonl and no
evaluation.json yet, a full fine-tune never has an adapter/: these are absent, not wrong. What is
there and cannot be read is wrong, and named.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from minilora.arithmetic import singular_values
from minilora.peft_format.directory import read_adapter
from minilora.summarization.presets import UserError

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MEASURES = (*METRICS, "gen_len")
SIDES = ("base", "finetuned", "difference")
TEXTS = ("id", "dialogue", "reference", "base", "finetuned")

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
        """||s B A||^2 over the largest singular value squared: 1 to r, without a threshold."""
        return (self.norm / self.values[0]) ** 2 if self.values[0] else 0.0


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json, with every score and its 95% interval."""

    data: str
    split: str
    scores: dict[str, dict[str, tuple[float, float, float]]]
    """By side ("base", "finetuned", "difference") and measure: mean, low, high."""
    examples: tuple[Record, ...]
    """id, dialogue, reference, base, finetuned, rouge1_base, rouge1_finetuned."""


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
    """seconds and peak_bytes; None while it is under way, or was stopped."""
    spectra: tuple[Spectrum, ...]
    dora: bool
    evaluation: Evaluation | None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def seconds(self) -> float:
        """Of training and validation; while it is under way, of its steps so far."""
        if self.end is not None:
            return float(self.end["seconds"])
        return math.fsum(record["seconds"] or 0 for record in self.steps)

    @property
    def best(self) -> Record | None:
        """The validation whose adapter was kept."""
        scored = [record for record in self.validations if record["rouge1"] is not None]
        return max(scored, key=lambda record: record["rouge1"], default=None)


def read_report(directory: Path) -> Run:
    """Read a run for the report.

    Raises:
        UserError: it is no run, or one of its files is damaged; the file is named.
        LoRAError: its adapter is damaged.
        OSError: a file cannot be read.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    config = _object(directory / "config.json")
    if config is None:
        raise UserError(f"{directory} is not a run: it has no config.json")
    log = list(_log(directory / "log.jsonl"))
    kinds: dict[str, list[Record]] = {"start": [], "step": [], "validation": [], "end": []}
    for record in log:
        kinds.get(record["kind"], []).append(record)
    dora, spectra = _spectra(directory / "adapter")
    return Run(
        path=directory,
        config=config,
        start=kinds["start"][-1] if kinds["start"] else None,
        steps=tuple(kinds["step"]),
        validations=tuple(kinds["validation"]),
        end=kinds["end"][-1] if kinds["end"] else None,
        spectra=spectra,
        dora=dora,
        evaluation=_evaluation(directory / "evaluation.json"),
    )


def _object(path: Path) -> Record | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no object")
    return content


# What a record of each kind must hold besides its name.
LOG_KEYS = {
    "start": ("trainable", "total"),
    "step": ("step", "loss", "seconds"),
    "validation": ("step", "epoch", "loss", "rouge1", "rouge2", "rougeL"),
    "end": ("seconds", "peak_bytes"),
}
MAY_BE_NULL = {  # infinity and NaN are written as null; a step need not be timed
    "step": ("loss", "seconds"),
    "validation": ("loss", "rouge1", "rouge2", "rougeL"),
}


def _log(path: Path) -> Iterator[Record]:
    """The records; kinds that are not known are passed over."""
    if not path.exists():
        return
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last: half a line, if it died
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: cannot be read as JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise UserError(f"{where}: is no record")
        for key in LOG_KEYS.get(record["kind"], ()):
            if record.get(key) is not None or key not in MAY_BE_NULL.get(record["kind"], ()):
                _number(record, key, where)
            record.setdefault(key, None)
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
    content = _object(path)
    if content is None:
        return None
    examples = content.get("examples")
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{path}: has no examples")
    for position, example in enumerate(examples):
        where = f"{path}: examples[{position}]"
        if not isinstance(example, dict):
            raise UserError(f"{where} is no object")
        for key in TEXTS:
            if not isinstance(example.get(key), str):
                raise UserError(f"{where}: {key} is not a text")
        for key in ("rouge1_base", "rouge1_finetuned"):
            _number(example, key, where)
    return Evaluation(
        data=str(content.get("data", "")),
        split=str(content.get("split", "")),
        scores={side: {m: _score(content, side, m, path) for m in MEASURES} for side in SIDES},
        examples=tuple(examples),
    )


def _score(content: Record, side: str, measure: str, path: Path) -> tuple[float, float, float]:
    """Mean, low, high: evaluation.json keeps the means of base and fine-tuned apart."""
    intervals = content.get("intervals")
    row = intervals.get(side) if isinstance(intervals, dict) else None
    found = row.get(measure) if isinstance(row, dict) else None
    bounds = [_number(found, i, f"{path}: intervals, {side}, {measure}") for i in (0, 1)]
    if side == "difference":
        return bounds[0], bounds[1], _number(found, 2, f"{path}: intervals, {side}, {measure}")
    return _number(content.get(side), measure, f"{path}: {side}"), bounds[0], bounds[1]


def _spectra(directory: Path) -> tuple[bool, tuple[Spectrum, ...]]:
    """Of every module of the adapter, from its factors: B A itself, (out, in), is never built."""
    if not directory.exists():
        return False, ()
    adapter = read_adapter(directory)
    found = []
    for module in adapter.modules:
        A, B = (tensor.double() for tensor in adapter.pair(module))
        scale = adapter.scale_of(module)
        values = (abs(scale) * singular_values((A, B))).tolist()
        found.append(Spectrum(module, (B.shape[0], A.shape[1]), scale, tuple(values)))
    return adapter.config.dora, tuple(found)
