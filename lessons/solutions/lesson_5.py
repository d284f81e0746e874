"""Lesson 5: memory, solved."""

from collections.abc import Callable

import torch
from torch import Tensor


def training_bytes(parameters: int, trained: int) -> dict[str, int]:
    return {"weights": 4 * parameters, "gradients": 4 * trained, "optimizer": 8 * trained}


def kept_bytes(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in inputs}
    kept = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        function(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


class Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return x @ W.T

    @staticmethod
    def backward(ctx, G: Tensor) -> tuple[Tensor, None]:
        (W,) = ctx.saved_tensors
        return G @ W, None


def frozen_linear(x: Tensor, W: Tensor) -> Tensor:
    return Frozen.apply(x, W)
