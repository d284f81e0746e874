"""Train, validation and test: those of the data, and those held out from its training split."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from ..errors import UserError, counted
from ..settings import SPLITS, DataOptions
from .reading import Example, read_source
from .sources import find

HELD_OUT = 0.05  # share of the rows that becomes a split the data does not bring


def load(
    options: DataOptions, splits: Sequence[str] = SPLITS
) -> tuple[dict[str, list[Example]], list[str]]:
    """Read splits from a directory, files or the hub.

    A missing split is held out of train; where only test is missing, validation is used for it.

    Returns:
        The splits, and notices for the user.

    Raises:
        UserError: there is no such data or split, or a row is malformed.
    """
    sources, notices = find(options)
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
            found = ", ".join(dict.fromkeys(source.name for source in sources.values()))
            raise UserError(f"{options.name}: no {split} data; found: {found}")
        data[split] = read(split)
    trained_on = {example.dialogue for example in data.get("train", ())}
    for split in SPLITS[1:]:
        examples = data.get(split, [])
        if count := sum(example.dialogue in trained_on for example in examples):
            some = f"{counted(count, 'dialogue')} of {len(examples):,}"
            notices.append(f"{split}: {some} are also in the training data")
    return {split: data[split] for split in splits}, list(dict.fromkeys(notices))


def _hold_out(
    examples: list[Example], splits: Sequence[str], name: str, notices: list[str]
) -> dict[str, list[Example]]:
    """Choose rows by a hash of the dialogue: new rows move no others, equal ones stay together.

    In small data this does not hold: each split takes at least one row, whatever its hash.
    """
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
    notices.append(f"no {' and '.join(splits)} data: rows of {name} are held out ({counts})")
    return parts


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 over ids, dialogues and references in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.dialogue, *example.references]).encode())
    return digest.hexdigest()
