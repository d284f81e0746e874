"""What goes beyond plain LoRA, one file a method. A method is one or more of these parts:

    part     what it provides                                           its table
    layer    a subclass of LoRALinear: `add_parameters`, `forward`,     LAYERS, in inject.py
             and `delta` or `merged_weight` for merging
             names and shapes of its parameters on disk                 PARAMETERS, in
                                                                        peft_format/keys.py
    start    fills A and B, and may replace the base                    STARTS, in initialization.py
    extra    an `inject.Extra`: parameters outside the layers           EXTRAS, in inject.py
    base     a `linears.LinearLike` and its way to plain linears        DEQUANTIZERS, in inject.py

Add entries to these tables; inject, merge, disabled, unwrap, unload and the files then handle the
method. A new field of LoRAConfig also needs its test in `RULES`, in config.py, and its name in
PEFT's file in `FIELDS`, in peft_format/config.py. A layer is made with rank, alpha, dropout, rslora
and init only: one with more settings gets them in `inject.wrap`. Two layers of LAYERS exclude each
other: `LoRAConfig.__post_init__` refuses that. The files of plain LoRA (functional to merge) import
nothing from here.

Where methods that do not exist yet would go, and what they need:

- AdaLoRA is a layer with one more parameter, the r singular values: it overrides `forward` and
  `delta`. What it prunes after a step is a function of its file, `allocate(model, step)`, which
  the training loop has to call after `optimizer.step()`; it finds its layers by
  `inject.lora_layers`. No table has such functions yet.
- Prompt and prefix tuning wrap no layer. Each is an extra: `start` adds the parameters and a
  forward hook, `find` names them for the files, `swap` takes them out and puts them back. Each has
  a configuration class of its own. `inject` has to skip `select` for it, and `merge._layers` has
  to accept a model without layers.
"""

from minilora.initialization import STARTS
from minilora.inject import DEQUANTIZERS, EXTRAS, LAYERS
from minilora.methods.dora import DoRALinear
from minilora.methods.lora_bias import LoRABiasLinear
from minilora.methods.prefix_tuning import PrefixConfig as PrefixConfig
from minilora.methods.prefix_tuning import PrefixTuning
from minilora.methods.prompt_tuning import PromptConfig as PromptConfig
from minilora.methods.prompt_tuning import PromptTuning
from minilora.methods.token_rows import TokenRows
from minilora.methods.virtual_tokens_files import (
    read_prefix,
    read_prompt,
    write_prefix,
    write_prompt,
)  # fmt: skip
from minilora.nf4.loftq import loftq
from minilora.nf4.model import dequantized
from minilora.peft_format.directory import TYPES, WRITERS
from minilora.trained_whole import TrainedWhole

LAYERS.update(dora=DoRALinear, lora_bias=LoRABiasLinear)
STARTS.update(loftq=loftq)
EXTRAS.extend((TrainedWhole, TokenRows, PromptTuning, PrefixTuning))
TYPES.update(PROMPT_TUNING=read_prompt, PREFIX_TUNING=read_prefix, MINILORA_PREFIX=read_prefix)
WRITERS.update(prompt=write_prompt, prefix=write_prefix)
DEQUANTIZERS.append(dequantized)
