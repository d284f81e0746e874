"""Lesson 2: the layer. Replace each `raise` with a few lines; the test beside this file checks it.

W (out, in), A (r, in), B (out, r), x (n, in), y (n, out), G = dL/dy (n, out).
"""

from torch import Tensor


def lora_forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, mask: Tensor) -> Tensor:
    """The output x W^T + s (x * mask) A^T B^T, (n, out): dropout on the branch only.

    `mask` (n, in) holds 0 where an input of the branch is dropped and 1 / (1 - p) elsewhere.
    """
    raise NotImplementedError


def lora_gradients(
    x: Tensor, A: Tensor, B: Tensor, s: float, mask: Tensor, G: Tensor
) -> tuple[Tensor, Tensor]:
    """(dL/dA, dL/dB) of the layer above, without autograd.

    Replace x in the lesson's equations by what the branch sees, x * mask.
    """
    raise NotImplementedError


def first_step(A: Tensor, M: Tensor, s: float, learning_rate: float) -> Tensor:
    """Delta W = s B A (out, in) after one step of plain gradient descent from B = 0.

    M (out, in) is dL/dW = G^T x, the gradient of full fine-tuning.
    """
    raise NotImplementedError
