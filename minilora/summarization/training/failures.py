"""What can fail in the middle of a run: memory, and numbers that are not finite."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from ..data.batches import Encoded
from ..errors import UserError
from ..settings import TrainingOptions


class BadBatch(UserError):
    """A loss or gradient that is not finite, and its dialogues."""

    def __init__(self, what: str, value: float, step: int, ids: Sequence[str]) -> None:
        super().__init__(
            f"the {what} is {value} in step {step}, on the dialogues {', '.join(ids)}: lower "
            "--learning-rate or use --precision fp32"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU's memory, or of the computer's: torch has no class of its own for the latter."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in said or "can't allocate memory" in said or "not enough memory" in said
    )


@contextmanager
def out_of_memory(where: str, instead: str) -> Iterator[None]:
    """Inside the block an allocation that fails ends in one line: "out of memory", where, instead.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {where}: {instead}") from None


def smaller_evaluation_batch(size: int) -> str:
    """The advice where writing summaries takes too much memory."""
    return f"lower --evaluation-batch-size, such as {max(1, size // 2)} for {size}"


def step_memory(
    batch: Sequence[Encoded], training: TrainingOptions, step: int
) -> AbstractContextManager[None]:
    """`out_of_memory` for a batch of a step: it is named, with the flags that take less memory."""
    size, half = training.batch_size, max(1, training.batch_size // 2)
    instead = (
        f"--batch-size {half} --accumulate {training.accumulate * size // half} comes to the same"
    )
    if size == 1:
        instead = "lower --max-source-length"
    sources, targets = (
        max((len(tokens) for tokens in side), default=0)
        for side in ([row.source for row in batch], [row.target for row in batch])
    )
    return out_of_memory(
        f"in step {step} on a batch of {len(batch)} dialogues of up to {sources} tokens, summaries "
        f"of up to {targets} ({', '.join(row.id for row in batch)})",
        instead,
    )
