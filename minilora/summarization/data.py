"""From files or the hub to padded batches: read, validate, split, tokenize, bucket, collate.

Dialogues come as rows with columns: JSON objects, lines of a CSV file, rows of a hub data set. What
cannot be used is never dropped in silence: it stops the run with the row named, or is left out and
said in a notice. Local files are read by Python's own readers, so that every row keeps its number.
"""

import csv
import difflib
import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minilora.summarization.presets import DataOptions, UserError, embedded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
FORMATS = (".json", ".jsonl", ".csv")
HELD_OUT = 0.05  # share of the rows that becomes a split the data does not bring
SHOWN = 5  # notices about single rows of a file; the others are counted
IGNORED = -100  # label of padding; cross-entropy leaves it out

_SPLIT_OF = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)


@dataclass(frozen=True)
class Example:
    """One dialogue with its reference. `id` is a label for people: it may occur twice."""

    id: str
    dialogue: str
    summary: str


@dataclass(frozen=True)
class Encoded:
    """An `Example` as token ids, special tokens (`<s>` ... `</s>` for BART) included."""

    id: str
    source: list[int]
    target: list[int]


@dataclass(frozen=True)
class Truncation:
    """How many of `total` examples were cut to the length limits."""

    sources: int
    targets: int
    total: int

    def __str__(self) -> str:
        return (
            f"{self.sources:,} of {self.total:,} dialogues cut to --max-source-length, "
            f"{self.targets:,} summaries to --max-target-length"
        )


class _BadRow(ValueError):
    """A row that cannot be used, and why."""


class _EmptyDialogue(_BadRow):
    """The one fault a training row may have: there is nothing to learn from it."""


Rows = Iterable[tuple[str, object]]  # where a row stands ("row 3", "line 7"), what stands there


@dataclass(frozen=True)
class _Source:
    name: str  # in messages
    rows: Callable[[], Rows]


# Loading ------------------------------------------------------------------------------------------


def load(
    options: DataOptions, splits: Sequence[str] = SPLITS
) -> tuple[dict[str, list[Example]], list[str]]:
    """Reads the splits asked for from `options.data`: a directory, a file or a hub name.

    A split that the data does not bring is held out of train, or validation stands in for test.
    Returns the splits and notices for the user; raises UserError with one line.
    """
    if unknown := [split for split in splits if split not in SPLITS]:
        raise UserError(f"no split is called {unknown[0]!r}; there are {', '.join(SPLITS)}")
    sources, notices = _find(options.data), list[str]()
    absent = [split for split in SPLITS[1:] if split not in sources]
    if absent == ["test"]:
        absent, sources["test"] = [], sources["validation"]
        if "test" in splits:
            name = sources["test"].name
            notices.append(f"no test data: {name} stands in, which also chooses the best epoch")

    def read(split: str) -> list[Example]:
        return _examples(sources[split], options, notices, training=split == "train")

    data: dict[str, list[Example]] = {}
    if absent and "train" in sources and {"train", *absent}.intersection(splits):
        data = _hold_out(read("train"), absent, sources["train"].name, notices)
    for split in splits:
        if split in data:
            continue
        if split not in sources:
            found = ", ".join(source.name for source in sources.values())
            raise UserError(f"{options.data}: no {split} data; found: {found}")
        data[split] = read(split)
    return {split: data[split] for split in splits}, list(dict.fromkeys(notices))


def load_file(path: str | Path, options: DataOptions) -> tuple[list[Example], list[str]]:
    """One file whole, and notices for the user."""
    notices: list[str] = []
    return _examples(_file(Path(path)), options, notices, training=False), notices


def _examples(
    source: _Source, options: DataOptions, notices: list[str], training: bool
) -> list[Example]:
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
    notices += [f"{row}, left out" for row in left_out[:SHOWN]]
    if len(left_out) > SHOWN:
        notices.append(f"{source.name}: {len(left_out) - SHOWN:,} more bad rows left out")
    return examples


def _hold_out(
    examples: list[Example], splits: Sequence[str], name: str, notices: list[str]
) -> dict[str, list[Example]]:
    """Chosen by a hash of the dialogue: rows added later move no other, twins stay together."""
    digests = [hashlib.sha256(example.dialogue.encode()).digest() for example in examples]
    order = sorted(range(len(examples)), key=digests.__getitem__)
    parts, start = dict[str, list[Example]](), 0
    for number, split in enumerate(splits, 1):
        limit = int(HELD_OUT * number * 2**64).to_bytes(8, "big")
        end = max(start + 1, sum(digest < limit for digest in digests))  # at least one row
        parts[split], start = [examples[i] for i in sorted(order[start:end])], end
    parts["train"] = [examples[i] for i in sorted(order[start:])]
    if not all(parts.values()):
        raise UserError(f"{name}: too few rows to hold out {' and '.join(splits)} data")
    counts = ", ".join(f"{len(parts[split]):,} {split}" for split in ("train", *splits))
    notices.append(f"no {' and '.join(splits)} data: held out of {name} ({counts})")
    return parts


# Finding ------------------------------------------------------------------------------------------


def _find(data: str) -> dict[str, _Source]:
    """The source of every split that `data` brings; a lone file counts as train."""
    try:
        path = Path(embedded(data)).expanduser()
        if path.is_dir():
            return _directory(path)
        if path.exists():
            return {"train": _file(path)}
    except (OSError, RuntimeError) as error:  # no permission, too long a name, no such user
        raise UserError(f"{data}: cannot be read ({error})") from None
    is_path = data.lower().endswith(FORMATS) or ("/" in data and path.parent.is_dir())
    if is_path or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", data):
        raise UserError(_no_such(path))
    return _hub(data)


def _directory(path: Path) -> dict[str, _Source]:
    files = sorted(path.iterdir())
    readable = [file for file in files if file.suffix.lower() in FORMATS and not file.is_dir()]
    sources = _by_split((file.stem, _file(file)) for file in readable)
    if not sources:
        raise UserError(
            f"{path}: no data; expected train, validation and test, each with one of "
            f"{', '.join(FORMATS)}; found: {_some([file.name for file in files])}"
        )
    return sources


def _file(path: Path) -> _Source:
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: not a data file; the name must end in {', '.join(FORMATS)}")
    return _Source(str(path), lambda: _rows(path))


def _hub(name: str) -> dict[str, _Source]:
    import datasets  # not above: it takes a second, which local files need not wait for

    def rows(split: Iterable[object]) -> Rows:
        with _one_line(name):
            yield from ((f"row {number}", row) for number, row in enumerate(split, 1))

    with _one_line(name):
        found = datasets.load_dataset(name)
    sources = _by_split(
        (key, _Source(f"{name} {key}", partial(rows, split))) for key, split in found.items()
    )
    if not sources:
        raise UserError(f"{name}: no train, validation or test split; found: {_some(list(found))}")
    return sources


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Whatever the hub, the network or a file format comes up with ends in one line."""
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{_no_such(Path(name))}; nor does the hub give it ({why})") from None


def _by_split(named: Iterable[tuple[str, _Source]]) -> dict[str, _Source]:
    sources: dict[str, _Source] = {}
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
    # The content tells a JSON list from JSON Lines: both go by the name of .json.
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
    return _line_feeds(text.removeprefix("\ufeff"))


def _line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _object(pairs: list[tuple[str, object]]) -> object:
    """A row as a dict, unless a column would replace another of the same name."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else _BadRow("a column occurs twice")


_JSON = json.JSONDecoder(object_pairs_hook=_object)
_COMMA = re.compile(r"\s*(,|(?=]))\s*")


def _json_list(path: Path, text: str, position: int) -> Rows:
    """`[{...}, {...}]`, element by element, so that an error knows its row."""
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


def _example(row: object, place: str, options: DataOptions) -> Example:
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, dict):
        raise _BadRow(f"{_kind(row)} where an object with columns belongs")
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
    except UnicodeEncodeError as error:  # JSON can spell what no text may hold: "\ud83d" alone
        raise _BadRow(f"{what} holds a lone surrogate, {value[error.start]!a}") from None
    return _line_feeds(value).strip()


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _id_of(row: object) -> str:
    identity = row.get("id") if isinstance(row, dict) else None
    return f" (id {_short(identity)})" if isinstance(identity, str | int) else ""


def _short(value: object) -> str:
    """At most 40 characters, one line: what a message can show."""
    text = str(value) if str(value).isprintable() else ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(map(_short, names[:10])) or "none"
    return shown + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 over ids, dialogues and summaries in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.dialogue, example.summary]).encode())
    return digest.hexdigest()


# Tokenizing ---------------------------------------------------------------------------------------


def build_prompt(dialogue: str, options: DataOptions) -> str:
    r"""The text the model reads; a written-out `\n` in the prompt's flags is a line break."""
    before, after = _prompt(options)
    return before + dialogue + after


def _prompt(options: DataOptions) -> tuple[str, str]:
    return options.prompt_before.replace("\\n", "\n"), options.prompt_after.replace("\\n", "\n")


def encode(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", options: DataOptions
) -> tuple[list[Encoded], Truncation]:
    """Token ids of prompts and summaries, in the order of `examples`, cut to the length limits.

    Of a long source the end of the dialogue goes; the prompt after it and `</s>` stay. Raises
    UserError if a limit leaves no room beside prompt and special tokens.
    """
    dialogues = [example.dialogue for example in examples]
    summaries = [example.summary for example in examples]
    sources, long_sources = _limited(
        tokenizer, "source", dialogues, options.max_source_length, _prompt(options)
    )
    targets, long_targets = _limited(tokenizer, "target", summaries, options.max_target_length)
    encoded = [
        Encoded(example.id, source, target)
        for example, source, target in zip(examples, sources, targets, strict=True)
    ]
    return encoded, Truncation(long_sources, long_targets, len(encoded))


def _limited(
    tokenizer: "PreTrainedTokenizerBase",
    side: Literal["source", "target"],
    texts: Sequence[str],
    limit: int,
    prompt: tuple[str, str] = ("", ""),
) -> tuple[list[list[int]], int]:
    """Token ids of the texts inside the prompt, at most `limit` each, and how many were cut."""
    before, after = prompt

    def tokenize(texts: Sequence[str], **more: bool) -> Any:
        arguments: dict[str, Any] = {"text" if side == "source" else "text_target": list(texts)}
        # A dialogue that says "</s>" says four characters: without split_special_tokens it ends.
        return tokenizer(**arguments, **more, split_special_tokens=True, verbose=False)

    opening = tokenize(["x"], return_special_tokens_mask=True)["special_tokens_mask"][0].index(0)
    ending = tokenize([after])["input_ids"][0][opening:]  # the prompt's end, then </s>
    if (used := len(tokenize([before + after])["input_ids"][0])) >= limit:
        raise UserError(f"--max-{side}-length {limit}: prompt and special tokens alone take {used}")
    rows, cut = list[list[int]](), 0
    for start in range(0, len(texts), 512):  # not all at once: the tokenizer keeps 120 B a token
        chunk = [before + text + after for text in texts[start : start + 512]]
        for row in tokenize(chunk)["input_ids"]:
            cut += len(row) > limit
            rows.append(row if len(row) <= limit else row[: limit - len(ending)] + ending)
    return rows, cut


# Batching -----------------------------------------------------------------------------------------


def batches(
    lengths: Sequence[tuple[int, int]], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of indexes into `lengths` for one epoch: random, but of like length within a batch.

    `lengths` are (source, target) in tokens. Shuffled examples are sorted by length in chunks of
    100 batches, cut, and the batches shuffled: little padding, and as good as random to the model.
    A pure function of its arguments: to go on in mid-epoch takes nothing but the position.
    """
    generator = random.Random(f"{seed} {epoch}")  # of its own: the global state stays as it is
    order = list(range(len(lengths)))
    generator.shuffle(order)
    found: list[list[int]] = []
    for start in range(0, len(order), 100 * batch_size):
        chunk = order[start : start + 100 * batch_size]
        found += _slices(sorted(chunk, key=lengths.__getitem__), batch_size)
    generator.shuffle(found)
    return found


def by_length(encoded: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Batches of indexes, longest source first: if memory does not suffice, it shows at once."""
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].source))
    return _slices(order, batch_size)


def _slices(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def collate(batch: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Pads b examples to the longest source, s tokens, and the longest target, t tokens.

    The mask and the -100 follow from the lengths, not from the ids: a text may hold the pad token.
    """
    return {
        "input_ids": _pad([row.source for row in batch], pad_token_id),  # (b, s)
        "attention_mask": _pad([[1] * len(row.source) for row in batch], 0),  # (b, s), 1 on tokens
        "labels": _pad([row.target for row in batch], IGNORED),  # (b, t)
    }


def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    padded = [row + [value] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long)  # (b, width)
