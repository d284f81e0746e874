"""Read and check rows: a source becomes `Example`s.

A dialogue is a text, a list of texts, or a list of turns such as {"speaker": ..., "text": ...}. A
bad row stops the run with an error that names it, or it is left out with a notice.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, counted
from ..settings import DataOptions
from .formats import BadRow, line_feeds, short, some
from .sources import Source, file_source

SHOWN = 5  # notices about single rows of a file; the others are counted

# Usual names of columns, the flags' defaults first, and of the keys of a turn.
DIALOGUES = ("dialogue", "text", "document", "article", "source", "messages", "turns")
SUMMARIES = ("summary", "target", "highlights", "reference")
SPEAKERS = ("speaker", "role", "from", "name")
TEXTS = ("text", "content", "value", "utterance")


@dataclass(frozen=True)
class Example:
    """One dialogue with its reference. `id` is a label for people: it may occur twice."""

    id: str
    dialogue: str
    summary: str
    more: tuple[str, ...] = ()
    """Further references: ROUGE takes the best score. Training uses `summary` only."""

    @property
    def references(self) -> tuple[str, ...]:
        return (self.summary, *self.more)


class _EmptyDialogue(BadRow):
    """Training leaves such rows out: they hold nothing to learn."""


def load_file(
    path: str | Path, options: DataOptions, references: bool = True
) -> tuple[list[Example], list[str]]:
    """All rows of one file, and notices for the user; without `references` summaries are empty."""
    return read_source(file_source(Path(path)), options, references=references)


def read_source(
    source: Source, options: DataOptions, training: bool = False, references: bool = True
) -> tuple[list[Example], list[str]]:
    """The rows of a source as examples, and notices for the user.

    Args:
        source: where the rows are.
        options: the columns' names, and whether bad rows are left out.
        training: leave out rows with an empty dialogue.
        references: whether the rows must have a summary.

    Raises:
        UserError: a row is malformed, there is none, or the source cannot be read.
    """
    examples, bad, left_out = list[Example](), list[str](), list[str]()
    dialogue, summaries = "", list[str]()  # the columns, as the first row names them
    seen = dict[str, object]()
    for place, row in source.rows():
        try:
            columns = _dict(row)
            if not dialogue:
                dialogue, summaries = _columns(columns, options, references)
            if not columns.keys() <= seen.keys():  # later rows may have further references
                seen |= columns
                found = _columns(seen, options, references)[1]
                summaries = found if found[: len(summaries)] == summaries else summaries
            examples.append(_example(columns, place.split()[-1], dialogue, summaries))
        except BadRow as error:
            skip = options.skip_bad_rows or (training and isinstance(error, _EmptyDialogue))
            (left_out if skip else bad).append(f"{place}{_id_of(row)}: {error}")
    if bad:
        more = f" (the first of {len(bad):,} bad rows)" if len(bad) > 1 else ""
        if examples:  # else nothing would be left
            more += "; --skip-bad-rows leaves such rows out"
        raise UserError(f"{bad[0]}{more}")
    if not examples:
        raise UserError(f"{source.name}: no rows" + (f" left; {left_out[0]}" if left_out else ""))
    notices = [f"{row}, left out" for row in left_out[:SHOWN]]
    if len(left_out) > SHOWN:
        notices.append(f"{source.name}: {counted(len(left_out) - SHOWN, 'more bad row')} left out")
    if {dialogue, *summaries} - {options.dialogue_column, options.summary_column}:
        best = ": training learns the first summary, ROUGE counts the best" * (len(summaries) > 1)
        notices.append(f"columns read: {some([dialogue, *summaries])}{best}")
    return examples, notices


def _dict(row: object) -> dict[str, object]:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"expected an object with columns, found {_kind(row)}")
    return row


def _columns(
    row: dict[str, object], options: DataOptions, references: bool
) -> tuple[str, list[str]]:
    """The columns of dialogue and references: by the flags, else by usual names."""
    dialogues = _called(row, options.dialogue_column, DIALOGUES)
    if not references:
        return dialogues[0], []
    return dialogues[0], _called(row, options.summary_column, SUMMARIES, r"[ _-]?\d*")


def _called(row: dict[str, object], wanted: str, usual: Sequence[str], end: str = "") -> list[str]:
    """The columns named `wanted`; if this is the default, those of the first usual name found.

    Of columns that differ in case only, the one that is spelt like the name counts.
    """
    for name in usual if wanted == usual[0] else (wanted,):
        found = dict[str, str]()
        for column in row:
            alike = re.fullmatch(re.escape(name) + end, column, re.IGNORECASE)
            exact = column.startswith(name)
            if alike and (exact or column.casefold() not in found):
                found[column.casefold()] = column
        if found:
            return list(found.values())
    raise _no_column(wanted, row)


def _no_column(name: str, row: dict[str, object]) -> BadRow:
    flags = "--dialogue-column NAME and --summary-column NAME say which to read"
    return BadRow(f"no column {name!r}; columns found: {some(row)}; {flags}")


def _example(row: dict[str, object], number: str, dialogue: str, summaries: list[str]) -> Example:
    # A row may have fewer references than other rows, but at least one.
    given = [name for name in summaries if str(row.get(name) or "").strip()] or summaries[:1]
    for name in (dialogue, *given):
        if name not in row:
            raise _no_column(name, row)
    value = "" if row[dialogue] is None else row[dialogue]  # one of SAMSum's on the hub is null
    text = _joined(value, f"column {dialogue!r}").strip()
    if not text:
        raise _EmptyDialogue("empty dialogue")
    references = [_text_of(row[name], f"column {name!r}") for name in given] or [""]
    if given and not all(references):
        raise BadRow("empty summary")
    identity = row.get("id")
    unknown = isinstance(identity, BadRow | None)
    name = number if unknown else _text_of(str(identity), "column 'id'") or number
    return Example(name, text, references[0], tuple(references[1:]))


def _joined(value: object, what: str) -> str:
    """A text, or the turns of a list, one on each line."""
    if not isinstance(value, list):
        return _text_of(value, what)
    return "\n".join(
        _turn(turn, f"turn {number} of {what}") for number, turn in enumerate(value, 1)
    )


def _turn(turn: object, what: str) -> str:
    """A turn as `speaker: text`, or as text only."""
    if not isinstance(turn, dict):
        return _text_of(turn, what)
    speaker, text = (next((turn[k] for k in keys if k in turn), None) for keys in (SPEAKERS, TEXTS))
    text = _text_of(text, f"{what} ({' or '.join(TEXTS)})")
    return text if speaker is None else f"{_text_of(speaker, f'speaker of {what}')}: {text}"


def _text_of(value: object, what: str) -> str:
    if isinstance(value, BadRow):
        raise BadRow(f"{what} {value}")
    if not isinstance(value, str):
        raise BadRow(f"{what} is {_kind(value)}, not text")
    if "\0" in value:
        raise BadRow(f"{what} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold it: "\ud83d" alone
        raise BadRow(f"{what} holds a lone surrogate, {value[error.start]!a}") from None
    return line_feeds(value).strip()


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _id_of(row: object) -> str:
    identity = row.get("id") if isinstance(row, dict) else None
    return f" (id {short(identity)})" if isinstance(identity, str | int) else ""
