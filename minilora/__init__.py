"""minilora: low-rank adaptation (LoRA) for PyTorch, written from scratch.

A frozen weight W (out, in) becomes W + s B A with A (r, in), B (out, r) and s = alpha / r; only A
and B train (Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3).

    one layer, to study     LoRALinear
    a whole model           LoRAConfig, inject, trainable_parameters, config_of, unwrap, unload
    base and adapter        merge, unmerge, disabled
    an optimizer's groups   parameter_groups: B at a higher rate than A (LoRA+)
    does training work      verify_training, around the first steps
    PEFT's files            save_adapter, load_adapter
    adapters as values      read_adapter, write_adapter, Adapter, combine, extract, Fitted
    a base in four bits     quantize, NF4Linear; inject afterwards is QLoRA
    is this LoRA right      conformance, a module: check, check_model, cases
    what was done           InjectReport, MergeReport, LoadReport, QuantizeReport, TrainingReport
    what was wrong          LoRAError, a ValueError: one line with what, where and what to do

Functions change the model in place, and most return a report. An error leaves it unchanged.

Example:
    >>> import torch, minilora
    >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 16)})
    >>> config = minilora.LoRAConfig(rank=2, alpha=8, targets=("q_proj",))
    >>> print(minilora.inject(model, config))  # freezes the model, wraps every target
    1 module, 64 trainable of 336 (19.0476%)
      q_proj
    >>> optimizer = torch.optim.AdamW(minilora.trainable_parameters(model), lr=1e-3)
    >>> model["q_proj"](torch.ones(3, 16)).sum().backward()  # your loop
    >>> optimizer.step()
    >>> plain = minilora.unwrap(model)  # merged: costs what the base costs
    >>> type(plain["q_proj"]).__name__
    'Linear'
"""

import signal
import sys

# In the commands `minilora` and `python -m minilora`, Ctrl-C during the import of PyTorch ends the
# process without a traceback. This is set here because Python runs this file before the command's
# own. A program that imports minilora keeps its signal handlers.
_is_command = sys.orig_argv[1:3] == ["-m", "minilora"] or sys.argv[0].endswith("/minilora")
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# ruff: noqa: E402
from minilora import conformance, methods  # noqa: F401, methods fills the tables of inject
from minilora.arithmetic import Fitted, combine, extract
from minilora.config import LoRAConfig, LoRAError
from minilora.inject import unload, unwrap
from minilora.layer import LoRALinear
from minilora.merge import disabled, merge, unmerge
from minilora.methods.lora_plus import parameter_groups
from minilora.methods.together import config_of, inject
from minilora.modules import trainable_parameters
from minilora.nf4.linear import NF4Linear
from minilora.nf4.model import QuantizeReport, quantize
from minilora.peft_format.apply import load_adapter, save_adapter
from minilora.peft_format.directory import Adapter, read_adapter, write_adapter
from minilora.reports import InjectReport, LoadReport, MergeReport
from minilora.verify import TrainingReport, verify_training

__version__ = "0.1.0"

__all__ = [
    "Adapter", "Fitted", "InjectReport", "LoRAConfig", "LoRAError", "LoRALinear", "LoadReport",
    "MergeReport", "NF4Linear", "QuantizeReport", "TrainingReport", "combine", "config_of",
    "disabled", "extract", "inject", "load_adapter", "merge", "parameter_groups", "quantize",
    "read_adapter", "save_adapter", "trainable_parameters", "unload", "unmerge", "unwrap",
    "verify_training", "write_adapter",
]  # fmt: skip
