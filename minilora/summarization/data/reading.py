"""Find, read and check rows: a directory, a file or a hub data set becomes `Example`s.

Dialogues come as rows with columns: JSON objects, lines of a CSV file, rows of a hub data set. A
bad row stops the run and is named, or it is left out and a notice names it. Local files are read by
Python's own readers, so that every row keeps its number.
"""

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import UserError, one_line
from ..presets import local_path
from ..settings import DataOptions

FORMATS = (".json", ".jsonl", ".csv")
SHOWN = 5  # notices about single rows of a file; the others are counted

_SPLIT_OF = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)


@dataclass(frozen=True)
class Example:
    """One dialogue with its reference. `id` is a label for people: it may occur twice."""

    id: str
    dialogue: str
    summary: str


class _BadRow(ValueError):
    """A row that cannot be used, and why."""


class _EmptyDialogue(_BadRow):
    """Training leaves such rows out: they hold nothing to learn."""


Rows = Iterable[tuple[str, object]]  # where a row stands ("row 3", "line 7"), what stands there


@dataclass(frozen=True)
class Source:
    """Where rows are read: a file, or a split of a hub data set."""

    name: str
    """Its name in messages."""
    rows: Callable[[], Rows]


# Finding ------------------------------------------------------------------------------------------


def find(data: str) -> dict[str, Source]:
    """The sources of `data`, by split: train, validation and test.

    Args:
        data: a directory, a file (it counts as train), a hub name, or an embedded name.

    Raises:
        UserError: there is no such data, or nothing in it that can be read.
    """
    path = local_path(data)
    try:
        if path.is_dir():
            return _directory(path)
        if path.exists():
            return {"train": _file(path)}
    except OSError as error:  # no permission, too long a name
        raise UserError(f"{data}: cannot be read ({error})") from None
    is_path = data.lower().endswith(FORMATS) or ("/" in data and path.parent.is_dir())
    if is_path or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", data):
        raise UserError(_no_such(path))
    return _hub(data)


def _directory(path: Path) -> dict[str, Source]:
    files = sorted(path.iterdir())
    readable = [file for file in files if file.suffix.lower() in FORMATS and not file.is_dir()]
    sources = _by_split((file.stem, _file(file)) for file in readable)
    if not sources:
        raise UserError(
            f"{path}: no data; expected train, validation and test, each with one of "
            f"{', '.join(FORMATS)}; found: {_some([file.name for file in files])}"
        )
    return sources


def _file(path: Path) -> Source:
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: not a data file; the name must end in {', '.join(FORMATS)}")
    return Source(str(path), lambda: _rows(path))


def _hub(name: str) -> dict[str, Source]:
    try:
        import datasets  # here, since local files need neither it nor the second it takes
    except ImportError:
        raise UserError(f"{name}: hub data needs a package: pip install datasets") from None

    def rows(split: Iterable[object]) -> Rows:
        with _one_line(name):
            yield from ((f"row {number}", row) for number, row in enumerate(split, 1))

    with _one_line(name):
        found = datasets.load_dataset(name)
    sources = _by_split(
        (key, Source(f"{name} {key}", partial(rows, split))) for key, split in found.items()
    )
    if not sources:
        raise UserError(f"{name}: no train, validation or test split; found: {_some(list(found))}")
    return sources


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Every error of the hub, the network or a file format ends in one line."""
    try:
        yield
    except Exception as error:
        why = one_line(error, name=True)
        raise UserError(f"{_no_such(Path(name))}, and the hub does not have it ({why})") from None


def _by_split(named: Iterable[tuple[str, Source]]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for name, source in named:
        if split := _SPLIT_OF.get(name.lower()):
            if split in sources:
                both = f"{sources[split].name} and {source.name}"
                raise UserError(f"{both} are both {split} data; keep one of them")
            sources[split] = source
    return sources


def _no_such(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")], n=1)
    hint = f" (but there is {path.parent / near[0]})" if near else ""
    return f"{path}: no such file or directory{hint}"


# Reading ------------------------------------------------------------------------------------------


def _rows(path: Path) -> Rows:
    text = _text(path)
    if path.suffix.lower() == ".csv":
        return _csv_rows(path, text)
    # The content tells a JSON list from JSON Lines: both are called .json.
    opening = re.match(r"\s*\[\s*", text)
    return _json_list(path, text, opening.end()) if opening else _json_lines(text)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(_no_such(path)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x} at offset {error.start:,}"
        raise UserError(f"{path} line {line}: not UTF-8 ({byte}); save it as UTF-8") from None
    return line_feeds(text.removeprefix("\ufeff"))


def line_feeds(text: str) -> str:
    """Line ends of Windows and of old Macs become line feeds."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _object(pairs: list[tuple[str, object]]) -> object:
    """A row as a dict; a column that occurs twice is an error."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else _BadRow("a column occurs twice")


_JSON = json.JSONDecoder(object_pairs_hook=_object)
_COMMA = re.compile(r"\s*(,|(?=]))\s*")


def _json_list(path: Path, text: str, position: int) -> Rows:
    """`[{...}, {...}]`, element by element, so that an error can name its row."""
    number = 0
    while not text.startswith("]", position):
        number += 1
        try:
            row, position = _JSON.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} row {number}: not JSON ({_why(error)})") from None
        yield f"row {number}", row
        if not (comma := _COMMA.match(text, position)):
            raise UserError(f"{path} row {number}: no comma and no ] follows; is the file cut off?")
        position = comma.end()
    if text[position + 1 :].strip():
        raise UserError(f"{path} row {number}: text after the end of the list")


def _json_lines(text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split inside strings
        if line.strip():
            try:
                row = _JSON.decode(line)
            except (ValueError, RecursionError) as error:
                row = _BadRow(f"not JSON ({_why(error)})")
            yield f"line {number}", row


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        return f"{error.msg}, {line}column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number too long"


def _csv_rows(path: Path, text: str) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # 131,072 refuses long dialogues
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1  # where the row begins: quoted fields run over several lines
    try:
        for fields in reader:
            place, line = f"line {line}", reader.line_num + 1
            if not header:
                header = [name.strip() for name in fields]
            elif len(fields) == len(header):
                yield place, _object([pair for pair in zip(header, fields, strict=True) if pair[0]])
            elif fields:
                count = f"{len(fields)} fields where the header has {len(header)}"
                yield place, _BadRow(f"{count}; text with commas or line breaks needs quotes")
    except csv.Error as error:
        raise UserError(f"{path} line {line}: not CSV ({error}); check the quotes") from None


# Checking -----------------------------------------------------------------------------------------


def read_source(
    source: Source, options: DataOptions, training: bool = False
) -> tuple[list[Example], list[str]]:
    """The rows of a source as examples, and notices for the user.

    Args:
        source: where the rows are.
        options: the columns' names, and whether bad rows are left out.
        training: leave out rows with an empty dialogue.

    Raises:
        UserError: a row is malformed, there is none, or the source cannot be read.
    """
    examples, bad, left_out = list[Example](), list[str](), list[str]()
    for place, row in source.rows():
        try:
            examples.append(_example(row, place, options))
        except _BadRow as error:
            skip = options.skip_bad_rows or (training and isinstance(error, _EmptyDialogue))
            (left_out if skip else bad).append(f"{source.name} {place}{_id_of(row)}: {error}")
    if bad:
        more = f" (the first of {len(bad):,} bad rows)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; --skip-bad-rows leaves such rows out")
    if not examples:
        raise UserError(f"{source.name}: no rows" + (f" left; {left_out[0]}" if left_out else ""))
    notices = [f"{row}, left out" for row in left_out[:SHOWN]]
    if len(left_out) > SHOWN:
        notices.append(f"{source.name}: {len(left_out) - SHOWN:,} more bad rows left out")
    return examples, notices


def load_file(path: str | Path, options: DataOptions) -> tuple[list[Example], list[str]]:
    """One file whole, and notices for the user."""
    return read_source(_file(Path(path)), options)


def _example(row: object, place: str, options: DataOptions) -> Example:
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, dict):
        raise _BadRow(f"expected an object with columns, found {_kind(row)}")
    dialogue = _column(row, options.dialogue_column, "--dialogue-column")
    if not dialogue:
        raise _EmptyDialogue("empty dialogue")
    summary = _column(row, options.summary_column, "--summary-column")
    if not summary:
        raise _BadRow("empty summary")
    identity = row.get("id")
    identity = str(identity) if isinstance(identity, int | float) else identity
    number = place.split()[-1]
    name = number if identity is None else _text_of(identity, "column 'id'") or number
    return Example(name, dialogue, summary)


def _column(row: dict[str, object], name: str, flag: str) -> str:
    if name not in row:
        raise _BadRow(f"no column {name!r}; {flag} NAME; columns found: {_some(list(row))}")
    return _text_of(row[name], f"column {name!r}")


def _text_of(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{what} is {_kind(value)}, not text")
    if "\0" in value:
        raise _BadRow(f"{what} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold it: "\ud83d" alone
        raise _BadRow(f"{what} holds a lone surrogate, {value[error.start]!a}") from None
    return line_feeds(value).strip()


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _id_of(row: object) -> str:
    identity = row.get("id") if isinstance(row, dict) else None
    return f" (id {_short(identity)})" if isinstance(identity, str | int) else ""


def _short(value: object) -> str:
    """At most 40 characters, on one line."""
    text = str(value) if str(value).isprintable() else ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(map(_short, names[:10])) or "none"
    return shown + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
