"""The first steps of a run, checked by `minilora.verify_training`."""

import math
from contextlib import ExitStack

import torch
from torch import nn

from minilora import TrainingReport, verify_training
from minilora.reports import fold_names

STEPS = 3  # more than one: B starts at zero, so A's gradient is zero in the first step


class FirstSteps:
    """Counts the steps inside `verify_training`, and ends the check after `STEPS` of them.

    Args:
        model: with its adapter.
        optimizer: the run's optimizer.
        wanted: False: no check.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, wanted: bool) -> None:
        self.left, self.block = STEPS * wanted, ExitStack()
        if wanted:
            self.report = self.block.enter_context(verify_training(model, optimizer))

    def after(self, norm: float) -> TrainingReport | None:
        """The report after the last step of the check, else None.

        Args:
            norm: of the step's gradient. It is not finite if fp16 overflowed; GradScaler then
                skipped the step.
        """
        if self.left and math.isfinite(norm):
            self.left -= 1
            if not self.left:
                self.block.close()
                return self.report
        return None


def problems(report: TrainingReport) -> list[str]:
    """A line for each kind of problem. Tensors without a gradient are not also "not moved"."""
    # A mixture may use an expert only once in these steps. Then B gets a gradient, A a zero one.
    follow = {f"{name[:-1]}A" for name in report.moved if name not in report.no_gradient}
    found = {
        "not in the optimizer": report.not_in_optimizer,
        "no gradient": tuple(name for name in report.no_gradient if name not in follow),
        "not moved": tuple(name for name in report.not_moved if name not in report.no_gradient),
        "the base changed": report.base_changed,
    }
    steps = f"in the first {report.steps} steps"
    return [f"{steps}, {what}: {', '.join(fold_names(n))}" for what, n in found.items() if n]
