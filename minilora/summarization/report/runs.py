"""The files of a run, read and checked for the report; no model is loaded.

config.json is required. A run in progress has no end in its log.jsonl and no evaluation.json yet.
A file that exists and cannot be read is an error that names it.
"""

import json
import sys
from dataclasses import dataclass, fields
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, cast

import minilora

from ..errors import UserError
from ..evaluation import nonsense
from ..evaluation.compare import Compared, Evaluation
from ..evaluation.rouge import MEASURES, Interval
from ..files import read_object

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run. Numbers in the records are finite, or None where they were not."""

    path: Path
    config: Record
    start: Record | None
    """trainable and total parameters."""
    steps: tuple[Record, ...]
    """step, loss (nats per target token), learning rate."""
    validations: tuple[Record, ...]
    """step, epoch, loss, ROUGE."""
    end: Record | None
    """seconds and peak_bytes; None for a run in progress or stopped."""
    problems: tuple[str, ...]
    """Problems that `verify_training` found in the first steps."""
    evaluation: Evaluation | None
    ranks: dict[str, int]
    """For AdaLoRA: module -> rank in the saved adapter."""

    @property
    def best(self) -> Record | None:
        """The validation of the saved adapter; logs of earlier versions do not name it."""
        return next((record for record in reversed(self.validations) if record.get("best")), None)


def read_report(directory: Path) -> Run:
    """Read a run for the report.

    Raises:
        UserError: it is not a run, or one of its files is damaged; the file is named.
        OSError: a file cannot be read.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    config = read_object(directory / "config.json")
    if config is None:
        raise UserError(f"{directory} is not a run: it has no config.json")
    if "model_type" in config:
        raise UserError(f"{directory} is a model, not a run: name the directory of a run")
    log = _log(directory / "log.jsonl")
    return Run(
        path=directory,
        config=config,
        start=next(reversed(log["start"]), None),
        steps=tuple(log["step"]),
        validations=tuple(log["validation"]),
        end=next(reversed(log["end"]), None),
        problems=tuple(str(text) for record in log["check"] for text in _problems(record)),
        evaluation=_evaluation(directory / "evaluation.json"),
        ranks=_ranks(directory / "adapter") if config.get("method") == "adalora" else {},
    )


def _ranks(path: Path) -> dict[str, int]:
    """The number of nonzero singular values by module; {} before the first adapter is saved."""
    if not path.exists():
        return {}
    adapter = minilora.read_adapter(path)
    lambdas = {module: adapter.parameters(module).get("lora_E") for module in adapter.modules}
    return {module: int(t.count_nonzero()) for module, t in lambdas.items() if t is not None}


# The keys of each kind of record. Those in parentheses may be null, which stands for NaN.
LOG_KEYS = {
    "start": "trainable total",
    "step": "step (loss) (learning_rate)",
    "validation": "step epoch (loss) (rouge1) (rouge2) (rougeL)",
    "check": "",
    "end": "seconds peak_bytes",
}


def _log(path: Path) -> dict[str, list[Record]]:
    """The records by kind; unknown kinds are ignored."""
    log: dict[str, list[Record]] = {kind: [] for kind in LOG_KEYS}
    if not path.exists():
        return log
    *lines, _ = path.read_bytes().split(b"\n")  # a killed run ends in an incomplete line
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: cannot be read as JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise UserError(f"{where}: is not a JSON object with a kind")
        for key in LOG_KEYS.get(record["kind"], "").split():
            name = key.strip("()")
            if record.get(name) is not None or name == key:
                _number(record, where, name)
            record.setdefault(name, None)
        log.get(record["kind"], []).append(record)
    return log


def _problems(record: Record) -> list[Any]:
    found = record.get("problems")
    return found if isinstance(found, list) else []


def _number(content: Any, where: str, *keys: str | int) -> float:
    """The finite number at content[key][key]..."""
    *outer, last = keys
    where = ": ".join([where, *map(str, outer)])
    try:
        value = reduce(getitem, keys, content)
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{where}: has no {last}") from None
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # nor NaN
        raise UserError(f"{where}: {last} is {value!r:.40}, not a finite number")
    return cast(float, value)


def _evaluation(path: Path) -> Evaluation | None:
    content = read_object(path)
    if content is None:
        return None
    examples = content.get("examples")
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{path}: has no examples")
    compared = [_compared(example, f"{path}: examples[{i}]") for i, example in enumerate(examples)]
    kinds = nonsense.MEASURES if "reference" in content else ()
    both = (*MEASURES, *kinds)
    measures = {"base": both, "finetuned": both, "difference": MEASURES}
    if kinds:
        measures["reference"] = kinds
    return Evaluation(
        data=str(content.get("data", "")),
        split=str(content.get("split", "")),
        generation={},
        intervals={
            side: {name: _interval(content, side, name, str(path)) for name in names}
            for side, names in measures.items()
        },
        examples=compared,
    )


def _compared(example: Any, where: str) -> Compared:
    if not isinstance(example, dict):
        raise UserError(f"{where} is not a JSON object")
    more = example.get("more_references", [])
    for field in fields(Compared):
        if field.type is float:
            _number(example, where, field.name)
        elif field.name == "more_references":
            if not isinstance(more, list) or not all(isinstance(text, str) for text in more):
                raise UserError(f"{where}: more_references is not a list of strings")
        elif not isinstance(example.get(field.name), str):
            raise UserError(f"{where}: {field.name} is not a string")
    known = {field.name: example.get(field.name) for field in fields(Compared)}
    return Compared(**known | {"more_references": tuple(more)})


def _interval(content: Record, side: str, measure: str, where: str) -> Interval:
    """The file has [mean, low, high] for a difference, else [low, high] and the mean apart."""
    keys = ("intervals", side, measure)
    if side == "difference":
        return Interval(*(_number(content, where, *keys, i) for i in range(3)))
    mean = _number(content, where, side, measure)
    return Interval(mean, *(_number(content, where, *keys, i) for i in range(2)))
