"""The first steps of a run, checked by `minilora.verify_training`."""

import math
from contextlib import ExitStack

import torch
from torch import nn

from minilora import TrainingReport, verify_training
from minilora.reports import fold_names

STEPS = 3  # B starts at zero, so that A's gradient is zero in the first


class FirstSteps:
    """The check while it runs.

    Args:
        model: with its adapter.
        optimizer: that of the run.
        wanted: whether to check.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, wanted: bool) -> None:
        self.left, self.block = STEPS * wanted, ExitStack()
        if wanted:
            self.report = self.block.enter_context(verify_training(model, optimizer))

    def after(self, norm: float) -> TrainingReport | None:
        """The report, once enough steps were taken.

        Args:
            norm: of the step's gradient. If fp16 overflowed, it is not finite, and the step was
                skipped.
        """
        if self.left and math.isfinite(norm):
            self.left -= 1
            if not self.left:
                self.block.close()
                return self.report
        return None


def problems(report: TrainingReport) -> list[str]:
    """What is wrong, a line for each kind. What got no gradient does not move either."""
    # In a mixture of experts one may be reached once: B leaves zero, and A follows the next time.
    follow = {f"{name[:-1]}A" for name in report.moved if name not in report.no_gradient}
    found = {
        "not in the optimizer": report.not_in_optimizer,
        "no gradient": tuple(name for name in report.no_gradient if name not in follow),
        "not moved": tuple(name for name in report.not_moved if name not in report.no_gradient),
        "the base changed": report.base_changed,
    }
    steps = f"in the first {report.steps} steps"
    return [f"{steps}, {what}: {', '.join(fold_names(n))}" for what, n in found.items() if n]
