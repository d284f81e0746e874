"""What goes beyond plain LoRA, one file a method, and the tables by which the heart finds it.

    dora.py        DoRALinear: the length of each row trains apart from its direction
    lora_bias.py   LoRABiasLinear: B has a bias of its own

A new method is a subclass of LoRALinear and an entry in LAYERS, another start an entry in STARTS.
The files of plain LoRA (config to merge) import nothing from here.
"""

from minilora.initialization import STARTS
from minilora.inject import BESIDE, DEQUANTIZERS, LAYERS
from minilora.methods.dora import DoRALinear
from minilora.methods.lora_bias import LoRABiasLinear
from minilora.nf4.loftq import loftq
from minilora.nf4.model import dequantized
from minilora.trained_whole import TrainedWhole

LAYERS.update(dora=DoRALinear, lora_bias=LoRABiasLinear)
STARTS.update(loftq=loftq)
BESIDE.append(TrainedWhole)
DEQUANTIZERS.append(dequantized)
