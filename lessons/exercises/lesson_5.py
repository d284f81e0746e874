"""Lesson 5: memory. Float32 takes four bytes a number."""

from collections.abc import Callable

from torch import Tensor


def training_bytes(parameters: int, trained: int) -> dict[str, int]:
    """Bytes of "weights", "gradients" and "optimizer" (AdamW) in float32.

    `parameters` counts all numbers of the model, the trained ones too.
    """
    raise NotImplementedError


def kept_bytes(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Bytes that `function(*inputs)` keeps for its backward pass, each storage counted once.

    The storages of the inputs do not count: the caller keeps them.
    """
    raise NotImplementedError


def frozen_linear(x: Tensor, W: Tensor) -> Tensor:
    """The product x W^T, (n, out), for a frozen W (out, in): keeps only W.

    Write a torch.autograd.Function whose backward gives dL/dx = G W, and apply it here. Use
    `ctx.save_for_backward`; return None as the gradient of W. (x @ W.T keeps the same: the point is
    to write the backward yourself.)
    """
    raise NotImplementedError
