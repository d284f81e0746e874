"""loralib's layer: `pip install loralib`. It merges in eval() and unmerges in train()."""

import loralib
from torch import nn


def make(linear: nn.Linear, rank: int, alpha: float, dropout: float) -> nn.Module:
    layer = loralib.Linear(
        linear.in_features, linear.out_features, r=rank, lora_alpha=alpha, lora_dropout=dropout
    ).to(linear.weight.dtype)
    layer.load_state_dict(linear.state_dict(), strict=False)
    loralib.mark_only_lora_as_trainable(layer)
    return layer


layer = {"make": make, "merge": lambda layer: layer.eval(), "unmerge": lambda layer: layer.train()}
