"""Fingerprints of data and base model: a resumed run must not continue with others."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from ..data.splits import fingerprint
from ..model.digest import of_tensors

if TYPE_CHECKING:
    from .session import Split


def fingerprints(splits: Mapping[str, "Split"], model: nn.Module) -> dict[str, str]:
    """SHA-256 of each split, of its tokens and of the base model, by the names messages use.

    The content counts, not the name: a model in another directory is the same, one that was
    replaced in its directory is not.

    Args:
        splits: as text and as token ids, which change with the tokenizer.
        model: the base model before anything is injected.
    """
    found = {"base model": of_tensors(dict(model.named_parameters()) | dict(model.named_buffers()))}
    for name, split in splits.items():
        tokens = "".join(f"{row.source} {row.target}\n" for row in split.encoded)
        found[f"{name} data"] = fingerprint(split.examples)
        found[f"{name} tokens"] = hashlib.sha256(tokens.encode()).hexdigest()
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs from the run's start.

    A split that was not read this time (--no-evaluate) is not compared.
    """
    other = [name for name in before if now.get(name, before[name]) != before[name]]
    # Other dialogues have other tokens too, so only the data is named.
    shadowed = {name.replace(" data", " tokens") for name in other if name.endswith(" data")}
    return [name for name in other if name not in shadowed]
