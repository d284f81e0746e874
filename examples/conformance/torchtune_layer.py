"""torchtune's layer: `pip install torchtune torchao==0.14.1`. It merges a state dict, for good."""

import torch
from torch import nn
from torchtune.modules.peft import (
    LoRALinear,
    get_adapter_params,
    get_merged_lora_ckpt,
    set_trainable_params,
)


def make(linear: nn.Linear, rank: int, alpha: float, dropout: float) -> nn.Module:
    layer = LoRALinear(
        linear.in_features, linear.out_features, rank, alpha, dropout, use_bias=True
    ).to(linear.weight.dtype)
    layer.load_state_dict(linear.state_dict(), strict=False)
    set_trainable_params(layer, get_adapter_params(layer))
    return layer


def merge(layer: LoRALinear) -> nn.Module:
    """The plain linear that holds the merged state dict's tensors."""
    state = nn.ModuleDict({"layer": layer}).state_dict()
    merged = get_merged_lora_ckpt(state, rank=layer.rank, alpha=layer.alpha)
    plain = nn.Linear(layer.in_dim, layer.out_dim, device=torch.device("meta"))
    plain.load_state_dict({key.split(".")[-1]: t for key, t in merged.items()}, assign=True)
    return plain


layer = {"make": make, "merge": merge}
