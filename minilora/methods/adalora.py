"""AdaLoRA: training chooses the rank of each layer, within a budget for the whole model.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512. A module's update has the form of a singular
value decomposition. The singular values that matter least to the loss are set to zero.

    layer        AdaLoRALinear: W + s P diag(lambda) Q
    allocation   Allocation: the penalty before each optimizer step, the ranks after it
    files        in adalora_files.py
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as hooks

from minilora.config import LoRAConfig, LoRAError, check
from minilora.inject import Extra, injection_of, lora_layers
from minilora.layer import LoRALinear


@dataclass(frozen=True)
class AdaLoRAConfig(LoRAConfig):
    """The settings of AdaLoRA, which chooses the ranks in training (Zhang et al. 2023).

    Every adapted W becomes W + s P diag(lambda) Q with P (out, r), Q (r, in), r singular values
    lambda and s = alpha / r. At first all r of each module train. From step `initial_steps` on, the
    number of nonzero lambdas in the whole model falls. In the last `final_steps` steps it is
    `target_rank` for each module on average, and the chosen ranks are kept.

    The scale stays alpha / r for the initial r, whatever the ranks become. PEFT divides by
    r + 1e-5, so the `lora_alpha` of a file differs slightly from alpha, and s is the same.

    Args:
        rank: r, the rank that each module starts with.
        target_rank: mean rank of the modules at the end.
        initial_steps: t_i, optimizer steps before the ranks begin to fall.
        final_steps: t_f, optimizer steps at the end with fixed ranks.
        interval: Delta_T, optimizer steps from one allocation to the next.
        total_steps: T, optimizer steps of the whole training; it must be given.
        beta1: smoothing of the sensitivity. beta2: smoothing of its uncertainty.
        orthogonality: gamma, the weight of the penalty ||P^T P - I||^2 + ||Q Q^T - I||^2. PEFT and
            the authors' code use the norms without the square, averaged over the matrices.

    The other arguments are those of LoRAConfig, except `init`: P and Q always start normal with a
    standard deviation of 0.02, and lambda at zero.

    Raises:
        LoRAError: a value is out of range, or an option does not go with AdaLoRA.

    Example:
        >>> config = AdaLoRAConfig(rank=6, target_rank=2, total_steps=100, final_steps=20)
        >>> [config.budget(step, modules=10) for step in (1, 40, 80, 100)]
        [58, 25, 20, 20]
    """

    rank: int = 12
    target_rank: int = 8
    initial_steps: int = 0
    final_steps: int = 0
    interval: int = 1
    total_steps: int = 0
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1

    adalora = True  # not a field: LAYERS and PARAMETERS look it up

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_rank", "interval", "total_steps"):
            check(name, getattr(self, name), "rank")  # whole and at least 1
        for name in ("beta1", "beta2"):
            check(name, getattr(self, name), "dropout")  # in [0, 1)
        if self.target_rank > self.rank:
            raise LoRAError(f"target_rank {self.target_rank} is above the rank, {self.rank}")
        for name in ("initial_steps", "final_steps", "orthogonality"):
            kind, what = (int, "a whole number") if "steps" in name else (int | float, "a number")
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < 1e308:
                raise LoRAError(f"{name} must be {what} of at least 0, not {value!r}")
        if self.initial_steps + self.final_steps >= self.total_steps:
            raise LoRAError("initial_steps + final_steps must be less than total_steps")
        other = ("rank_pattern", "alpha_pattern", "rslora", "dora", "lora_bias")
        for name in [name for name in other if getattr(self, name)]:
            raise LoRAError(f"{name} does not go with AdaLoRA, which chooses the ranks by itself")
        if self.init != "kaiming":
            raise LoRAError(f"init {self.init!r} does not go with AdaLoRA, which has its own start")

    def budget(self, step: int, modules: int) -> int:
        """b(t), the number of nonzero singular values in the model after this step.

        Equation 12, with t - t_i in the numerator as in the authors' code. The paper prints
        t - t_i - t_f, which would start above b(0).
        """
        last_change = self.total_steps - self.final_steps
        left = 1 - (step - self.initial_steps) / (last_change - self.initial_steps)
        left = min(max(left, 0.0), 1.0)
        return int(((self.rank - self.target_rank) * left**3 + self.target_rank) * modules)


class AdaLoRALinear(LoRALinear):
    """y = (W + s P diag(lambda) Q) x + b: equation 3. P is `lora_B`, Q is `lora_A`.

    The arguments are those of `LoRALinear`, except `init`.

    Attributes:
        lora_E: parameter lambda (r, 1).
    """

    def add_parameters(self) -> None:
        """Lambda starts at zero, P and Q start at random."""
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        self.lora_E = nn.Parameter(torch.zeros_like(self.lora_A[:, :1]))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Diag(lambda) Q (r, in) and P (out, r)."""
        return self.lora_E * self.lora_A, self.lora_B


class Allocation(Extra):
    """What AdaLoRA does at each optimizer step: an `inject.Extra`. The training loop calls nothing.

    Two global hooks of torch run at every step of every `torch.optim.Optimizer`. The first
    injection of AdaLoRA registers them. They act if the optimizer holds the lambdas of a model:

        before   adds the gradient of the penalty to the gradients of P and Q
        after    updates the sensitivities, and sets lambdas to zero

    At that time gradient accumulation is over and DistributedDataParallel has averaged, so all
    processes choose alike; steps that GradScaler skips do not count. The sensitivities and the
    number of steps are in `optimizer.state`, like the moments of Adam, and are saved with it.

    Args:
        model: not yet changed.
        config: does nothing unless it is an AdaLoRAConfig.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, _: Collection[str]) -> None:
        self.active = isinstance(config, AdaLoRAConfig)

    def start(self, model: nn.Module) -> None:
        """Act at the optimizers' steps from now on."""
        if self.active:
            self.model, self.layers = model, list(lora_layers(model).values())
            follow(self)

    def stop(self, model: nn.Module) -> None:
        """Act at no further step."""
        FOLLOWING.discard(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state  # copy.deepcopy calls this: the layers in `state` are copies too
        if self.active:
            follow(self)

    @property
    def config(self) -> AdaLoRAConfig:
        """The model's current configuration: `load_adapter` may have replaced it."""
        config = getattr(injection_of(self.model), "config", None)
        assert isinstance(config, AdaLoRAConfig)
        return config

    def layers_of(self, optimizer: Optimizer) -> list[Any]:
        """The layers whose lambda, P and Q are all in the optimizer."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [layer for layer in self.layers if held.issuperset(map(id, triplets(layer)))]

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        """Add the gradient of gamma R to the gradients of P and Q."""
        scale = getattr(optimizer, "grad_scale", None)  # set if a fused optimizer unscales itself
        weight = self.config.orthogonality * (1 if scale is None else scale)
        for layer in with_gradient(self.layers_of(optimizer)):
            layer.lora_B.grad += weight * penalty_gradient(layer.lora_B)
            layer.lora_A.grad += weight * penalty_gradient(layer.lora_A.T).T

    @torch.no_grad()
    def after(self, optimizer: Optimizer) -> None:
        """Update the sensitivities; allocate the budget every `interval` steps (algorithm 1).

        As in the authors' code, the weights are those after the step. In the final steps the
        sensitivities are not updated, so the same ranks are kept.
        """
        skipped = getattr(optimizer, "found_inf", None)  # set by GradScaler for fused optimizers
        layers, state, config = self.layers_of(optimizer), optimizer.state, self.config
        counted = with_gradient(layers)
        if not counted or (skipped is not None and skipped):
            return
        t = 1 + max(int(state.get(x.lora_E, {}).get("allocation_steps", 0)) for x in layers)
        final = t >= config.total_steps - config.final_steps
        for layer in counted:
            state[layer.lora_E]["allocation_steps"] = t
            for p in triplets(layer) if not final else ():
                count_in(state[p], p, config)
        if final or (t > config.initial_steps and t % config.interval == 0):
            scores = [score(layer, optimizer) for layer in layers]
            masks = best(scores, config.budget(t, len(layers)))
            for layer, mask in zip(layers, masks, strict=True):
                layer.lora_E.masked_fill_(~mask[:, None], 0)


def triplets(layer: Any) -> tuple[nn.Parameter, ...]:
    """Lambda (r, 1), P (out, r) and Q (r, in): r triplets of a value, a column and a row."""
    return layer.lora_E, layer.lora_B, layer.lora_A


def with_gradient(layers: list[Any]) -> list[Any]:
    """The layers that took part in the step: one that LayerDrop skips has no gradient."""
    return [layer for layer in layers if all(p.grad is not None for p in triplets(layer))]


def penalty_gradient(M: Tensor) -> Tensor:
    """dR/dM (d, r) of R = ||M^T M - I||^2, where M is P or Q^T: equation 4.

    dR = 2 <M^T M - I, dM^T M + M^T dM> = <4 M (M^T M - I), dM>.
    """
    unit = torch.eye(M.shape[1], dtype=M.dtype, device=M.device)
    return 4 * M @ (M.T @ M - unit)


def count_in(state: dict[str, Any], w: Tensor, config: AdaLoRAConfig) -> None:
    """Update the smoothed sensitivity of each entry of a parameter, and its uncertainty."""
    assert w.grad is not None
    now = (w * w.grad).abs()  # equation 8
    mean = config.beta1 * state.get("sensitivity", 0) + (1 - config.beta1) * now  # equation 9
    apart = (now - mean).abs()
    spread = config.beta2 * state.get("uncertainty", 0) + (1 - config.beta2) * apart  # equation 10
    state["sensitivity"], state["uncertainty"] = mean, spread


def score(layer: Any, optimizer: Optimizer) -> Tensor:
    """S, how much each triplet of lambda_i, column i of P and row i of Q matters: (r,)."""

    def s(w: Tensor) -> Tensor:
        state = optimizer.state.get(w, {})
        if "sensitivity" not in state:  # no gradient so far
            return torch.zeros_like(w)
        product: Tensor = state["sensitivity"] * state["uncertainty"]  # equation 11
        return product

    # equation 7
    return s(layer.lora_E)[:, 0] + s(layer.lora_B).mean(dim=0) + s(layer.lora_A).mean(dim=1)


def best(scores: list[Tensor], budget: int) -> list[Tensor]:
    """Which triplets of each layer are among the `budget` best of all layers: (r,) each.

    The sort is stable: of equal scores the first layer's win, in every process alike.
    """
    together = torch.cat(scores)
    chosen = together.argsort(descending=True, stable=True)[:budget]
    kept = torch.zeros_like(together, dtype=torch.bool).index_fill_(0, chosen, True)
    return list(kept.split([len(one) for one in scores]))


FOLLOWING: "WeakSet[Allocation]" = WeakSet()
"""The allocations of all models. The references are weak, so that unused models are freed."""
HOOKS: list[Any] = []


def follow(allocation: Allocation) -> None:
    """Let the allocation act at every optimizer's step, as long as it exists."""
    FOLLOWING.add(allocation)
    if not HOOKS:
        HOOKS.append(hooks.register_optimizer_step_pre_hook(_before))
        HOOKS.append(hooks.register_optimizer_step_post_hook(_after))


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for allocation in [each for each in FOLLOWING if each.layers_of(optimizer)]:
        if any(map(callable, (*args[1:], *kwargs.values()))):
            what = "AdaLoRA needs the gradients before the step"
            raise LoRAError(f"{what}: call optimizer.step() without a closure")
        allocation.before(optimizer)


def _after(optimizer: Optimizer, *_: Any) -> None:
    for allocation in [each for each in FOLLOWING if each.layers_of(optimizer)]:
        allocation.after(optimizer)
