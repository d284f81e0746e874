"""Failures in the middle of a run: lack of memory, numbers that are not finite, decoding."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import processes
from ..data.batches import Encoded
from ..data.formats import some
from ..errors import UserError, counted, one_line
from ..evaluation.generate import summarize
from ..model.device import out_of_memory
from ..settings import GenerationOptions, TrainingOptions
from .schedule import Group


def require_finite(what: str, value: float, group: Group, step: int = 0) -> None:
    """Refuse a loss or a gradient's norm that is not finite.

    Raises:
        UserError: it names the dialogues, and the step if there is one.
    """
    if not math.isfinite(value):
        where = f" in step {step}," if step else ""
        ids = some(row.id for batch in group for row in batch)
        raise UserError(
            f"the {what} is {value}{where} on the dialogues {ids}: lower "
            "--learning-rate or use --precision fp32"
        )


def smaller_evaluation_batch(size: int, beams: str = "--beams") -> str:
    """The advice where writing summaries takes too much memory."""
    if size == 1:
        return f"lower {beams} or --max-source-length"
    return f"lower --evaluation-batch-size, such as {size // 2} for {size}"


def step_memory(
    batch: Sequence[Encoded], training: TrainingOptions, step: int
) -> AbstractContextManager[None]:
    """`out_of_memory` for a batch of a step: it is named, with the flags that take less memory."""
    size, advice = training.batch_size, "lower --max-source-length"
    if parts := [n for n in range(processes.world_size(), size) if size % n == 0]:
        more = training.accumulate * size // parts[-1]
        advice = (
            f"use --batch-size {parts[-1]} --accumulate {more}: the same number of dialogues per "
            "step, with less memory (in a resumed run with --accept-changes)"
        )
    source = max((len(row.source) for row in batch), default=0)
    target = max((len(row.target) for row in batch), default=0)
    return out_of_memory(
        f"in step {step} on a batch of {counted(len(batch), 'dialogue')} of up to {source} tokens, "
        f"summaries of up to {target} ({some(row.id for row in batch)})",
        advice,
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
    try:
        with out_of_memory("while summarizing one dialogue", smaller_evaluation_batch(1)):
            summarize(model, tokenizer, [row], short, autocast_dtype)
    except UserError:
        raise
    except Exception as error:  # models differ in the error for what they do not support
        kind, why = model.config.model_type, one_line(error, name=True)
        raise UserError(f"this {kind} model cannot write summaries here: {why}") from None
