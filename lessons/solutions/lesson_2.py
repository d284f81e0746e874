"""Lesson 2: the layer, solved."""

from torch import Tensor


def lora_forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, mask: Tensor) -> Tensor:
    return x @ W.T + s * ((x * mask) @ A.T) @ B.T


def lora_gradients(
    x: Tensor, A: Tensor, B: Tensor, s: float, mask: Tensor, G: Tensor
) -> tuple[Tensor, Tensor]:
    x = x * mask  # what the branch saw
    return s * (G @ B).T @ x, s * G.T @ (x @ A.T)


def first_step(A: Tensor, M: Tensor, s: float, learning_rate: float) -> Tensor:
    # dL/dA = s B^T M is zero at B = 0, so A stays; dL/dB = s M A^T, so B = -learning_rate s M A^T.
    return -learning_rate * s**2 * M @ A.T @ A
