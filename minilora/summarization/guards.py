"""What can go wrong in the middle of a run: noticed, named, and survived where that is wanted."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from minilora.summarization.data import Encoded
from minilora.summarization.presets import TrainingOptions, UserError
from minilora.summarization.reading import local_files

Stamps = Mapping[Path, tuple[int, ...]]

IN_A_ROW = 10
"""So many bad steps after one another are no accident: the weights themselves are spoilt."""


class BadBatch(UserError):
    """A loss or gradient that is not finite, and the dialogues it came from."""

    def __init__(self, what: str, value: float, step: int, ids: Sequence[str]) -> None:
        self.ids = list(ids)
        super().__init__(
            f"the {what} is {value} in step {step}, on the dialogues {', '.join(ids)}: lower "
            "--learning-rate, use --precision fp32, or leave such steps out with "
            "--skip-bad-batches"
        )


# Memory -------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU's memory, or of the computer's: torch has no class of its own for the latter."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in said or "can't allocate memory" in said or "not enough memory" in said
    )


@contextmanager
def out_of_memory(doing: str, instead: str) -> Iterator[None]:
    """Inside the block memory that does not suffice ends in one line.

    Raises:
        UserError: says what was being done, and what would take less.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory while {doing}: {instead}") from None


def smaller_evaluation_batch(size: int) -> str:
    """What to do where writing summaries takes too much memory."""
    return f"lower --evaluation-batch-size, such as {max(1, size // 2)} for {size}"


def too_large(batch: Sequence[Encoded], training: TrainingOptions, step: int) -> UserError:
    """The error that names a batch which memory does not suffice for, and what would fit."""
    sources, targets = max(len(r.source) for r in batch), max(len(r.target) for r in batch)
    half = max(1, training.batch_size // 2)
    instead = (
        f"--batch-size {half} --accumulate {training.accumulate * training.batch_size // half} "
        "comes to the same, and --auto-batch-size finds by itself what fits"
        if training.batch_size > 1
        else "lower --max-source-length"
    )
    return UserError(
        f"out of memory in step {step} on a batch of {len(batch)} dialogues of up to {sources} "
        f"tokens, summaries of up to {targets} ({', '.join(row.id for row in batch)}): {instead}"
    )


def pieces(batches: Sequence[Sequence[Encoded]], rows: int) -> list[Sequence[Encoded]]:
    """Batches of at most `rows` dialogues with the same dialogues in the same order; 0: as is.

    The gradient of a step is a sum over its batches, whatever their sizes: smaller ones take less
    memory and come to the same.
    """
    if not rows:
        return list(batches)
    return [batch[i : i + rows] for batch in batches for i in range(0, len(batch), rows)]


# Data that is written to while a run is under way -------------------------------------------------


def stamps(data: str) -> Stamps:
    """Size and time of the last change of every local file of the data."""
    found = {}
    for path in local_files(data):
        status = path.stat()
        found[path] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def changed(data: str, before: Stamps) -> list[Path]:
    """The files that are not what they were. One that cannot be looked at counts as changed."""
    try:
        now = stamps(data)
    except (OSError, UserError):
        now = {}
    return [path for path, stamp in before.items() if now.get(path) != stamp]
