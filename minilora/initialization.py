"""How A (r, in) and B (out, r) are initialized.

With B = 0 the adapted layer computes what the base computes. In the first step the gradient
dL/dA = s (dL/dy B)^T x is zero, but dL/dB = s (dL/dy)^T (x A^T) is not: B moves first, and A from
the second step on. If A were also zero, both gradients would stay zero.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn

Start = Callable[[nn.Module, Tensor, Tensor, float], nn.Module]
"""(base, A, B, s): fills A and B, and returns the layer to wrap: the base, or for LoftQ a quantized
one in its place."""


def kaiming(base: nn.Module, A: Tensor, B: Tensor, scale: float) -> nn.Module:
    """A uniform in +-1/sqrt(in): Kaiming with a = sqrt(5), as in loralib and PEFT; B = 0."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B)
    return base


def gaussian(base: nn.Module, A: Tensor, B: Tensor, scale: float) -> nn.Module:
    """A normal with standard deviation 1/r, as in PEFT; B = 0."""
    nn.init.normal_(A, std=1 / A.shape[0])
    nn.init.zeros_(B)
    return base


def random(base: nn.Module, A: Tensor, B: Tensor, scale: float) -> nn.Module:
    """Both uniform, so that the output changes at once; for tests."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return base


STARTS: dict[str, Start] = {"kaiming": kaiming, "gaussian": gaussian, "random": random}
"""By `LoRAConfig.init`, whose type `Init` names all. `minilora/methods/__init__.py` adds those of
other files."""
