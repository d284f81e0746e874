"""How A and B start."""

import math

from torch import Tensor, nn

from minilora.config import Init


def initialize(A: Tensor, B: Tensor, init: Init) -> None:
    """Fill A (r, in) and B (out, r) in place.

    With B = 0 the adapted layer starts as the base itself, and since dL/dB = s (dL/dy)^T (x A^T)
    is not zero, it does not stay there. Were A zero too, both gradients would be, for ever.

    - "kaiming": A uniform in +-1/sqrt(in) (what Kaiming with a = sqrt(5) comes to, as in loralib
      and PEFT), B zero.
    - "gaussian": A normal with standard deviation 1/r (as in PEFT), B zero.
    - "random": both uniform, so that the output changes at once; for tests.
    - "loftq": as "kaiming" here; then `quantize.loftq` fills them by what the base lost.
    """
    rank = A.shape[0]
    if init == "gaussian":
        nn.init.normal_(A, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if init == "random":
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)
