"""minilora: low-rank adaptation (LoRA) for PyTorch, written from scratch.

A frozen weight W (out, in) becomes W + s B A with A (r, in), B (out, r) and s = alpha / r; only A
and B train (Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3).

    one layer, to study     LoRALinear
    a whole model           LoRAConfig, inject, trainable_parameters, config_of, unwrap
    base and adapter        merge, unmerge, disabled
    PEFT's files            save_adapter, load_adapter
    adapters as values      read_adapter, write_adapter, Adapter, combine, extract, Fitted
    a base in four bits     quantize, NF4Linear; inject afterwards is QLoRA
    is this LoRA right      conformance, a module: check, check_model, cases
    what was done           InjectReport, MergeReport, LoadReport, QuantizeReport; all of them print
    what was wrong          LoRAError, a ValueError: one line with what, where and what to do

Models are changed in place and return a report; nothing is changed when an error is raised.

Example:
    >>> import torch, minilora
    >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 16)})
    >>> config = minilora.LoRAConfig(rank=2, alpha=8, targets=("q_proj",))
    >>> print(minilora.inject(model, config))  # freezes the model, wraps every target
    1 modules, 64 trainable of 336 (19.0476%)
      q_proj
    >>> optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=1e-3)
    >>> model["q_proj"](torch.ones(3, 16)).sum().backward()  # your loop
    >>> optimizer.step()
    >>> plain = minilora.unwrap(model)  # merged: costs what the base costs
    >>> type(plain["q_proj"]).__name__
    'Linear'
"""

from minilora import conformance as conformance
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
from minilora.quantize import NF4Linear, QuantizeReport, quantize

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
    "NF4Linear",
    "QuantizeReport",
    "combine",
    "config_of",
    "disabled",
    "extract",
    "inject",
    "load_adapter",
    "merge",
    "quantize",
    "read_adapter",
    "save_adapter",
    "trainable_parameters",
    "unmerge",
    "unwrap",
    "write_adapter",
]
