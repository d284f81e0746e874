"""Muon for many matrices of a few shapes: one batched product for all matrices of a shape.

Muon (Jordan 2024) steps along the orthogonal matrix nearest to the momentum, found by Newton and
Schulz's iteration, with the size of AdamW's step (Liu et al. 2025, section 2.2). `torch.optim.Muon`
does the same one matrix at a time: 40 small kernels for each of 60 matrices, which on a GPU take
the host longer than the whole of the model's forward and backward pass. With several processes
each does its share of the matrices.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalized(updates: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Newton and Schulz's iteration on a stack (n, rows, columns) with rows <= columns."""
    a, b, c = COEFFICIENTS
    x = updates.to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def shared(updates: Tensor, dtype: torch.dtype) -> Tensor:
    """All directions in float32; each process computes every n-th of them."""
    if not distributed.is_initialized():
        return orthogonalized(updates, dtype).float()
    mine = slice(distributed.get_rank(), None, distributed.get_world_size())
    directions = torch.zeros_like(updates, dtype=torch.float32)
    directions[mine] = orthogonalized(updates[mine], dtype).float()
    distributed.all_reduce(directions)
    return directions


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; weight decay apart. Parameters have two dimensions.

    `dtype` is that of the iteration: float32 is faster on a CPU whose bf16 is slow.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [p.grad for p in parameters]
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            alike: dict[tuple[int, int], list[int]] = defaultdict(list)
            for place, update in enumerate(updates):
                alike[min(update.shape), max(update.shape)].append(place)
            for (_, longer), places in alike.items():
                wide = [u if u.shape[1] == longer else u.mT for u in (updates[p] for p in places)]
                directions = shared(torch.stack(wide), self.dtype)
                chosen = [parameters[p] for p in places]
                steps = [
                    d if p.shape[1] == longer else d.mT
                    for p, d in zip(chosen, directions.unbind(), strict=True)
                ]
                torch._foreach_add_(chosen, steps, alpha=-group["lr"] * 0.2 * longer**0.5)
