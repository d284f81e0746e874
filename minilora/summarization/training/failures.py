"""Failures in the middle of a run: lack of memory, numbers that are not finite, decoding."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batches import Encoded
from ..errors import UserError, counted, one_line
from ..evaluation.generate import summarize
from ..settings import GenerationOptions, TrainingOptions
from .schedule import Group


def require_finite(what: str, value: float, step: int, group: Group) -> None:
    """Refuse a loss or a gradient's norm that is not finite.

    Raises:
        UserError: it names the step and its dialogues.
    """
    if not math.isfinite(value):
        ids = ", ".join(row.id for batch in group for row in batch)
        raise UserError(
            f"the {what} is {value} in step {step}, on the dialogues {ids}: lower "
            "--learning-rate or use --precision fp32"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or main memory ran out; for the latter torch has no class of error."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)


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
    same = f"--batch-size {half} --accumulate {training.accumulate * size // half}"
    source = max((len(row.source) for row in batch), default=0)
    target = max((len(row.target) for row in batch), default=0)
    return out_of_memory(
        f"in step {step} on a batch of {counted(len(batch), 'dialogue')} of up to {source} tokens, "
        f"summaries of up to {target} ({', '.join(row.id for row in batch)})",
        f"use {same}: the same update with less memory"
        if size > 1
        else "lower --max-source-length",
    )


def try_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: Encoded,
    generation: GenerationOptions,
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Decode three tokens, so that a model that cannot summarize fails before it is trained.

    Raises:
        UserError: transformers raised an error, which the message quotes; or memory ran out.
    """
    short = replace(generation, min_length=0, max_length=min(3, generation.max_length))
    smaller = smaller_evaluation_batch(generation.evaluation_batch_size)
    try:
        with out_of_memory("while summarizing one dialogue", smaller):
            summarize(model, tokenizer, [row], short, autocast_dtype)
    except UserError:
        raise
    except Exception as error:  # models differ in the error for what they do not support
        kind, why = model.config.model_type, one_line(error, name=True)
        raise UserError(f"this {kind} model cannot write summaries here: {why}") from None
