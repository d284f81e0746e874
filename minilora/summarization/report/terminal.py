"""The text on the terminal: scores, dialogues, and how a run went."""

import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from minilora.nf4.model import quantize_report

from .. import processes
from ..errors import counted
from ..evaluation.compare import Evaluation
from ..evaluation.rouge import tokenizer_for
from ..settings import RunConfig
from ..training.session import Session, trained_path
from ..training.trainer import Outcome
from .figures import Table, duration, nonsense_note, nonsense_table, score_table

NONSENSE_TITLE = """\
Percentage of summaries with: a name or a number that is not in the dialogue; a word that is in
neither the dialogue nor a list of English words; a repeated phrase"""


def most_changed(evaluation: Evaluation, k: int = 3) -> list[int]:
    """Positions of the `k` dialogues whose ROUGE-1 changed most, up or down."""
    return sorted(range(evaluation.n), key=lambda i: -abs(evaluation.examples[i].gain))[:k]


def format_comparison(evaluation: Evaluation) -> str:
    """The scores and the nonsense measures as plain text tables."""
    title = (
        f"{counted(evaluation.n, 'dialogue')}, {evaluation.split} split of {evaluation.data}. "
        "ROUGE as F1 x 100, gen_len in tokens: mean [95% bootstrap interval]; "
        "the difference is paired."
    )
    lines = [textwrap.fill(printable(title), 100), *_columns(score_table(evaluation))]
    if tokenizer_for(evaluation.references) == "unicode":
        lines.append("ROUGE compares Unicode words: the references are not in a-z alone.")
    if nonsense := nonsense_table(evaluation):
        lines += ["", NONSENSE_TITLE, *_columns(nonsense), *nonsense_note(evaluation)]
    else:
        lines.append(
            "Names, numbers and words are not checked: the texts are not in Latin letters."
        )
    return "\n".join(lines)


def _columns(table: Table) -> list[str]:
    """The first column to the left, the others to the right."""
    names, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = []
    for name, *cells in table:
        right = (f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        lines.append("  ".join([f"{name:<{names}}", *right]))
    return lines


def format_examples(evaluation: Evaluation, which: Sequence[int], dialogue_lines: int = 12) -> str:
    """The dialogues at these positions, cut to so many lines, above the three summaries."""
    return "\n\n".join(_format_example(evaluation, i, dialogue_lines) for i in which)


def _format_example(evaluation: Evaluation, position: int, dialogue_lines: int) -> str:
    example = evaluation.examples[position]
    dialogue = [line for turn in example.dialogue.splitlines() for line in _wrap(turn)]
    if (more := len(dialogue) - dialogue_lines) > 1:  # the notice is a line too
        dialogue[dialogue_lines:] = [f"... {more} more lines"]
    lines = [
        f"[{position + 1} of {evaluation.n}] {printable(example.id)}, ROUGE-1: "
        f"base {example.rouge1_base:.2f}, fine-tuned {example.rouge1_finetuned:.2f}"
    ]
    for label, texts in (
        ("dialogue", dialogue),
        ("reference", _wrap(example.reference)),
        *(("or", _wrap(text)) for text in example.more_references),
        ("base", _wrap(example.base)),
        ("fine-tuned", _wrap(example.finetuned)),
    ):
        texts = texts or ["(empty)"]
        lines += [f"  {label:<10}  {texts[0]}", *(" " * 14 + text for text in texts[1:])]
    return "\n".join(lines)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(printable(text), 86)


def format_summary(row: dict[str, str]) -> str:
    """The summary of a user's chat, and the base's if there is one."""
    said = {name: printable(text).strip() or "(empty)" for name, text in row.items()}
    if "base" not in said:
        return said["summary"]
    return f"base        {said['base']}\nfine-tuned  {said['summary']}"


def printable(text: str) -> str:
    """Without control characters, which a terminal executes, and lone surrogates, which raise."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text)


def _method(run: RunConfig) -> str:
    second = run.model.with_
    return run.model.method + (f" with a {second}" if second != "none" else "")


def header(session: Session, output: Path) -> str:
    """What will be trained, on which data, and into which directory."""
    run, train, validation = session.run, session.splits["train"], session.splits["validation"]
    count = processes.world_size()
    shared = f", {count} processes that share each batch" if count > 1 else ""
    precision = str(session.autocast_dtype or "float32").removeprefix("torch.")
    report = session.report
    sizes = f"{counted(len(train), 'dialogue')} to train, {len(validation):,}"
    trained = f"{report.trainable:,} trainable of {report.total:,} parameters"
    lines = [
        f"{run.model.model} on {run.data.name}: {sizes} to validate; {session.device.type}, "
        f"{precision}{shared}",
        f"{_method(run)}: {report if report.modules else trained}",
    ]
    if run.model.method == "qlora":
        lines.append(str(quantize_report(session.model)))
    if train.states:
        k = train.states.k
        layers = "encoder" if k is None else f"encoder, layers below {k}"
        lines.append(
            f"{layers}: computed once for each dialogue ({train.states}), its dropout is off"
        )
    return "\n".join([*lines, f"run: {output}"])


def summary(
    session: Session,
    outcome: Outcome,
    output: Path,
    seconds: float,
    evaluate: str,
    page: Path | None = None,
) -> str:
    """What the run cost, and how to use its result.

    Args:
        seconds: of the whole process, with set-up and scoring.
        evaluate: the command that scores and summarizes.
        page: where report.html is, if it was written.
    """
    report, progress = session.report, outcome.progress
    share = 100 * report.trainable / report.total
    return "\n".join(
        [
            f"trainable parameters  {report.trainable:,} of {report.total:,} ({share:.4f}%)",
            f"time                  {duration(seconds)}, of which training and validation took "
            f"{duration(progress.seconds)} ({counted(progress.step, 'step')})",
            f"peak memory           {progress.peak_bytes / 2**20:,.0f} MiB",
            f"saved                 {trained_path(output, session.run)}",
            *([f"report                {page}"] if page else []),
            f"summarize a chat      {evaluate} {shlex.quote(str(output))} --text chat.txt",
        ]
    )
