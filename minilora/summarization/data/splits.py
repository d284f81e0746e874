"""Train, validation and test: what the data brings, and what is held out where it brings less."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from ..errors import UserError
from ..presets import local_path
from ..settings import DataOptions
from .reading import FORMATS, Example, find, read_source

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.05  # share of the rows that becomes a split the data does not bring


def load(
    options: DataOptions, splits: Sequence[str] = SPLITS
) -> tuple[dict[str, list[Example]], list[str]]:
    """Read splits from `options.data`: a directory, a file or a hub name.

    A missing split is held out of train; where only test is missing, validation is used for it.

    Returns:
        The splits, and notices for the user.

    Raises:
        UserError: there is no such data or split, or a row is malformed.
    """
    if unknown := [split for split in splits if split not in SPLITS]:
        raise UserError(f"no split is called {unknown[0]!r}; there are {', '.join(SPLITS)}")
    sources, notices = find(options.data), list[str]()
    if beside := _not_read(options.data, [source.name for source in sources.values()]):
        notices.append(f"{options.data}: not read: {', '.join(beside)}")
    absent = [split for split in SPLITS[1:] if split not in sources]
    if absent == ["test"]:
        absent, sources["test"] = [], sources["validation"]
        if "test" in splits:
            name = sources["test"].name
            notices.append(f"no test data: scored on {name}, which also chooses the best epoch")

    def read(split: str) -> list[Example]:
        examples, said = read_source(sources[split], options, training=split == "train")
        notices.extend(said)
        return examples

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


def _not_read(data: str, read: Sequence[str]) -> list[str]:
    """Data files of a directory that are no split, such as train_2.jsonl beside train.jsonl."""
    folder, shard = local_path(data), re.compile(r"-\d+-of-\d+.*")
    whole = {shard.sub("", name.split(" and ")[0]) for name in read}
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    data_files = (file for file in files if file.suffix.lower() in FORMATS)
    return [file.name for file in data_files if shard.sub("", str(file)) not in whole]


def _hold_out(
    examples: list[Example], splits: Sequence[str], name: str, notices: list[str]
) -> dict[str, list[Example]]:
    """Choose rows by a hash of the dialogue: new rows move no others, equal ones stay together."""
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


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 over ids, dialogues and summaries in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.dialogue, example.summary]).encode())
    return digest.hexdigest()
