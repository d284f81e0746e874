"""The rows of one file, each with its location for messages.

The standard library reads CSV, TSV, JSON and JSON Lines, gzipped or not, so that an error names the
line. `datasets` reads parquet and the folders of `save_to_disk`, and is imported only for these.
"""

import csv
import difflib
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, counted, one_line

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
DELIMITERS = ",;\t|"

Rows = Iterable[tuple[str, object]]  # location ("a.csv line 7"), content


class BadRow(ValueError):
    """The reason why a row cannot be used. Readers yield it instead of the row."""


def is_data(path: Path) -> bool:
    """Whether its name is that of a data file, or it is a folder that `save_to_disk` wrote."""
    return _is_saved(path) or (suffix(path) in FORMATS and not path.is_dir())


def suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file()


def file_rows(path: Path) -> Rows:
    """The rows of a file.

    Raises:
        UserError: it cannot be read; or, while iterating, a row after which reading cannot go on.
    """
    if suffix(path) == ".parquet" or _is_saved(path):
        return _arrow_rows(path)
    text = read_text(path)
    if suffix(path) in (".csv", ".tsv"):
        return _csv_rows(path, text)
    # The content tells a JSON list from JSON Lines: both are called .json.
    opening = _LIST.match(text)
    is_list = opening and not (opening["wrapped"] and _is_lines(text))
    return _json_list(path, text, opening) if opening and is_list else _json_lines(path, text)


# Text files ---------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (- is standard input), gzipped or not, with line feeds as line ends.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    if str(path) == "-" and sys.stdin is None:  # the shell's <&-
        raise UserError("-: standard input is closed")
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        if content.startswith(b"\x1f\x8b"):  # gzip, whatever the name
            content = gzip.decompress(content)
        return line_feeds(content.decode("utf-8").removeprefix("\ufeff"))
    except FileNotFoundError:
        raise UserError(no_such(path)) from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x} at offset {error.start:,}"
        raise UserError(f"{path} line {line}: not UTF-8 ({byte}); save it as UTF-8") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: damaged or cut off ({one_line(error)})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def line_feeds(text: str) -> str:
    """Replace the line ends of Windows and of old Macs by line feeds."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def no_such(path: Path) -> str:
    if path.is_symlink():
        return f"{path}: no such file: it is a link to {path.readlink()}"
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")], n=1)
    hint = f" (but there is {path.parent / near[0]})" if near else ""
    return f"{path}: no such file or directory{hint}"


def some(names: Iterable[object]) -> str:
    """Names for a message: the first ten, each on one line."""
    shown = list(map(short, names))
    more = f" and {len(shown) - 10:,} more" if len(shown) > 10 else ""
    return (", ".join(shown[:10]) or "none") + more


def short(value: object) -> str:
    """At most 40 characters, on one line."""
    text = str(value) if str(value).isprintable() else ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A row as a dict; a column that occurs twice has an error as its value."""
    row: dict[str, object] = {}
    for name, value in pairs:
        row[name] = BadRow("occurs twice") if name in row else value
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_object)
_COMMA = re.compile(r"\s*(,|(?=]))\s*")
# `[`, or `{"data": [` after entries such as a version or a licence, which nest at most once.
_SINGLE = r'\s*"\w*"\s*:\s*(?:"[^"]*"|[\w.+-]+|\{[^{}]*\}|\[[^\[\]{}]*\])\s*,'
_LIST = re.compile(rf'\s*(?P<wrapped>\{{(?:{_SINGLE})*\s*"data"\s*:\s*)?\[\s*')


def _json_list(path: Path, text: str, opening: re.Match[str]) -> Rows:
    """`[{...}, {...}]`, element by element, so that an error can name its row."""
    place, number, position = str(path), 0, opening.end()
    while not text.startswith("]", position):
        number += 1
        place = f"{path} row {number}"
        try:
            row, position = _JSON.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({_why(error)})") from None
        yield place, row
        if not (comma := _COMMA.match(text, position)):
            raise UserError(f"{place}: no comma and no ] follows; is the file cut off?")
        position = comma.end()
    try:  # what follows ends the object, after entries such as a version, and the file
        whole = _JSON.decode(('{"data": [' if opening["wrapped"] else "[") + text[position:])
    except (ValueError, RecursionError) as error:
        whole = BadRow(error)
    twice = isinstance(whole, dict) and isinstance(whole["data"], BadRow)
    if twice or isinstance(whole, BadRow):
        what = "the list ends here, but other text follows, or the closing } is missing"
        raise UserError(f"{place}: {what}")


def _is_lines(text: str) -> bool:
    """Whether the first line is an object and others follow: its "data" is a column then."""
    first, _, more = text.lstrip().partition("\n")
    try:
        return bool(more.strip() and _JSON.decode(first))
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split inside strings
        if line.strip():
            try:
                row = _JSON.decode(line)
            except (ValueError, RecursionError) as error:
                row = BadRow(f"not JSON ({_why(error)})")
            yield f"{path} line {number}", row


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return one_line(error).replace(": line 1 column", ", column")


def _csv_rows(path: Path, text: str) -> Rows:
    if "\0" in text:  # Python 3.10 cannot read it, UTF-16 without a mark is full of it
        number = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path} line {number} holds a NUL character")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # 131,072 refuses long dialogues
    delimiter = max(DELIMITERS, key=text.lstrip("\n").partition("\n")[0].count)  # in the header
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    header: list[str] = []
    line = 1  # where the row begins; quoted fields may span several lines
    try:
        for fields in reader:
            place, line = f"{path} line {line}", reader.line_num + 1
            if not any(header):
                header = [name.strip() for name in fields]
            elif len(fields) == len(header):
                yield place, _object([pair for pair in zip(header, fields, strict=True) if pair[0]])
            elif fields:
                count = f"{counted(len(fields), 'field')} where the header has {len(header)}"
                yield place, BadRow(f"{count}; text with {delimiter!r} or line breaks needs quotes")
    except csv.Error as error:
        why = str(error).replace("\t", "\\t")
        raise UserError(f"{path} line {line}: not CSV ({why}); check the quotes") from None


# What `datasets` reads ----------------------------------------------------------------------------


def _arrow_rows(path: Path) -> Rows:
    with datasets_or_error(path, f"{path}: cannot be read") as datasets:
        datasets.disable_progress_bars()
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
        else:  # without a batch_size an empty file raises an error
            table = datasets.Dataset.from_parquet(str(path), batch_size=1000)
        yield from table_rows(path, table)


def table_rows(name: str | Path, table: Iterable[object]) -> Rows:
    return ((f"{name} row {number}", row) for number, row in enumerate(table, 1))


@contextmanager
def datasets_or_error(name: str | Path, failed: str) -> Iterator[Any]:
    """The package; every error of the hub, the network or a file format becomes a `UserError`."""
    try:
        import datasets  # here: it takes a second, and text files do not need it
    except ImportError:
        raise UserError(f"{name}: reading it needs a package: pip install datasets") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says it
    try:
        yield datasets
    except Exception as error:  # the cause is behind "an error occurred while generating ..."
        raise UserError(f"{failed} ({one_line(error.__cause__ or error, name=True)})") from None
