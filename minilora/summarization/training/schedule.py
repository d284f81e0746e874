"""How many steps a run takes, at which learning rate, and on which batches."""

import math
from collections.abc import Sequence

from ..data.batches import Encoded, batches
from ..settings import TrainingOptions

Group = Sequence[Sequence[Encoded]]
"""The batches of one optimizer step."""


def steps_per_epoch(training: TrainingOptions, rows: int) -> int:
    """The number of optimizer steps in an epoch. Its last group may be smaller."""
    return math.ceil(math.ceil(rows / training.batch_size) / training.accumulate)


def last_step(training: TrainingOptions, rows: int, epoch: int = 0, step: int = 0) -> int:
    """How many optimizer steps a run takes whose `epoch` begins after `step` steps.

    It is less than `step` if the run is asked for fewer steps than it has taken.
    """
    steps = step + (training.epochs - epoch) * steps_per_epoch(training, rows)
    return min(steps, training.max_steps) if training.max_steps else steps


def learning_rate(step: int, last: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps to `peak`, then linear decay to 0 at step `last`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (last - step) / max(1, last - warmup)


def epoch_groups(
    train: Sequence[Encoded], training: TrainingOptions, seed: int, epoch: int
) -> list[list[list[Encoded]]]:
    """The batches of an epoch, in groups of one optimizer step."""
    lengths = [(len(row.source), len(row.target)) for row in train]
    rows = [
        [train[i] for i in chosen] for chosen in batches(lengths, training.batch_size, seed, epoch)
    ]
    return [rows[i : i + training.accumulate] for i in range(0, len(rows), training.accumulate)]
