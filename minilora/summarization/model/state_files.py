"""The files of encoder states: written row by row, read by mapping, limited in size.

    runs/.encoder-cache/FINGERPRINT.safetensors    {"states": (tokens of all dialogues, d)}

Several processes may use the directory: one writes at a time. The least recently used files are
removed first.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from minilora.files import PARTIAL, sync

from ..errors import UserError

OURS = "[0-9a-f]" * 32 + ".safetensors"  # FINGERPRINT; the directory may hold other files
ON_DISK = 10 * 10**9  # bytes of all files together
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors


@contextmanager
def only_one(place: Path) -> Iterator[None]:
    """Inside the block this process alone writes into a directory of states; others wait.

    The kernel holds the lock (flock) and releases it when the process ends.
    """
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / ".lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        print(f"note: waiting for the process that writes to {place}", file=sys.stderr)
        held = lock.acquire()
    with held:
        yield


def make_room(place: Path, size: int) -> None:
    """Remove unfinished files of killed processes, and the oldest files if the limit is exceeded.

    Args:
        place: the directory.
        size: of the new file, in bytes.

    Raises:
        UserError: `size` is above the limit, or above the free space of the disk.
    """
    for path in place.glob(f".{OURS}{PARTIAL}"):
        path.unlink(missing_ok=True)
    what = f"the states take {size / 1e9:.1f} GB"
    if size > ON_DISK:
        limit = f"at most {ON_DISK / 1e9:.0f} GB are kept"
        raise UserError(f"{what}, {limit}: use --cache-encoder off")
    files = sorted(place.glob(OURS), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in files)
    for path in files:
        if total + size > ON_DISK:
            total -= path.stat().st_size
            path.unlink()
            print(f"note: {path} was removed: the oldest of the encoder's states", file=sys.stderr)
    if size > (free := shutil.disk_usage(place).free):
        instead = "use --cache-directory for another disk, or --cache-encoder off"
        raise UserError(f"{what}, and {place} has {free / 1e9:.1f} GB left: {instead}")


def write_states(path: Path, rows: Iterable[Tensor], shape: Sequence[int], dtype: Any) -> None:
    """Write a safetensors file row by row, (s, d) each, so that memory holds one batch.

    Atomic: after an error, Ctrl-C or a crash no file has this name.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    content = {"__metadata__": {"format": "pt"}, "states": entry}
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensor begins at a multiple of 8 bytes
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for row in rows:
                file.write(row.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def read_states(path: Path, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """(s, d) for each dialogue, mapped: read from the disk on use.

    Raises:
        UserError: the file is damaged.
    """
    try:
        states: Tensor = load_file(path)["states"]
        return torch.split(states, list(lengths))
    except (safetensors.SafetensorError, KeyError, RuntimeError):
        raise UserError(f"{path} is damaged: remove it") from None
