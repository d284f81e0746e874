"""minilora: LoRA for PyTorch, written from scratch.

config = LoRAConfig(rank=8, alpha=32, targets=("q_proj", "v_proj"))
print(minilora.inject(model, config))        # freezes the model, wraps every target
...                                          # train minilora.trainable_parameters(model)
minilora.save_adapter(model, "adapter")      # PEFT loads it
plain = minilora.unwrap(model)               # merged: costs what the base costs
"""

from minilora.adapter import (
    Adapter,
    LoadReport,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from minilora.arithmetic import Fitted, combine, extract
from minilora.config import LoRAConfig, LoRAError
from minilora.inject import InjectReport, config_of, inject, trainable_parameters, unwrap
from minilora.layer import LoRALinear
from minilora.merge import MergeReport, disabled, merge, unmerge

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Fitted",
    "InjectReport",
    "LoRAConfig",
    "LoRAError",
    "LoRALinear",
    "LoadReport",
    "MergeReport",
    "combine",
    "config_of",
    "disabled",
    "extract",
    "inject",
    "load_adapter",
    "merge",
    "read_adapter",
    "save_adapter",
    "trainable_parameters",
    "unmerge",
    "unwrap",
    "write_adapter",
]
