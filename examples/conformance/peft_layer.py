"""PEFT's layer: `pip install peft`. Its methods are called merge and unmerge, as usual."""

from peft import LoraConfig, get_peft_model
from torch import nn


def make(linear: nn.Module, rank: int, alpha: float, dropout: float, **more: object) -> nn.Module:
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["layer"], **more
    )
    return get_peft_model(nn.ModuleDict({"layer": linear}), config).base_model.model["layer"]


layer = {"make": make, "update": lambda layer: layer.get_delta_weight("default")}
