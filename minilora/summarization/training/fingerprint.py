"""Fingerprints of data and base model: a resumed run must not continue with others."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..data.batches import Encoded
from ..data.reading import Example
from ..data.splits import fingerprint

# Where a run computes. The same arithmetic elsewhere may round differently.
PLACES = ("torch", "device", "precision", "threads", "processes")


def fingerprints(
    data: Mapping[str, Sequence[Example]],
    encoded: Mapping[str, Sequence[Encoded]],
    model: nn.Module,
) -> dict[str, str]:
    """SHA-256 of each split, of its tokens and of the base model, by the names messages use.

    The content counts, not the name: a model in another directory is the same, one that was
    replaced in its directory is not.

    Args:
        data: the splits as they were read.
        encoded: the same as token ids, which change with the tokenizer.
        model: the base model before anything is injected.
    """
    found = {f"{split} data": fingerprint(examples) for split, examples in data.items()}
    for split, rows in encoded.items():
        digest = hashlib.sha256()
        for row in rows:
            digest.update(f"{row.source} {row.target}\n".encode())
        found[f"{split} tokens"] = digest.hexdigest()
    tensors = dict[str, Tensor](model.named_parameters()) | dict(model.named_buffers())
    return found | {"base model": of_tensors(tensors)}


def place(device: torch.device, dtype: torch.dtype | None, processes: int = 1) -> dict[str, str]:
    """Where a run computes, on how many processes, and in which precision."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    values = (torch.__version__, device.type, dtype or torch.float32, threads, processes)
    return dict(zip(PLACES, map(str, values), strict=True))


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What differs from the run's start: in what is computed, and where.

    A split that was not read this time (--no-evaluate) is not compared.
    """
    other = [name for name in before if now.get(name, before[name]) != before[name]]
    # Other dialogues have other tokens too, so only the data is named.
    shadowed = {name.replace(" data", " tokens") for name in other if name.endswith(" data")}
    what = [name for name in other if name not in PLACES and name not in shadowed]
    where = [f"{name} (was {before[name]}, is {now[name]})" for name in other if name in PLACES]
    return what, where


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
