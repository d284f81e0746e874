"""Methods beyond plain LoRA, one file each. A method is one or more of these parts:

    part     what it provides                                           its table
    layer    a subclass of LoRALinear: `add_parameters`, and `factors`  LAYERS, in inject.py
             or `forward` with `delta` or `merged_weight`
             names and shapes of its parameters on disk                 PARAMETERS, in
                                                                        peft_format/keys.py
    file     a `peft_type` of its own, with its configuration           KINDS, in
                                                                        peft_format/config.py
             or a conversion to plain LoRA, for a layer that differs    CONVERSIONS, in
                                                                        peft_format/apply.py
    start    fills A and B, and may replace the base                    STARTS, in initialization.py
    extra    an `inject.Extra`: parameters outside the layers           EXTRAS, in inject.py
    base     a `linears.LinearLike` and its way to plain linears        DEQUANTIZERS, in inject.py

Add entries to these tables; inject, merge, disabled, unwrap, unload and the files then handle the
method. A new field of LoRAConfig also needs its test in `RULES`, in config.py, and its name in
PEFT's file in `FIELDS`, in peft_format/config.py; a new value of `init` its name in the type
`Init`, in config.py, and PEFT's in `INITS`, in peft_format/config.py. A method with many settings
has a subclass of LoRAConfig, as AdaLoRA has. A layer gets rank, alpha, dropout, rslora and init
only; an extra gets the whole configuration. Two classes of LAYERS exclude each other: the
configuration refuses them together, or the start of one of them does. The files of plain LoRA
(functional to merge) import nothing from here.

    dora.py             magnitude and direction of each row         `LoRAConfig(dora=True)`
    lora_bias.py        B has a bias                                `LoRAConfig(lora_bias=True)`
    token_rows.py       rows of the embeddings train                `LoRAConfig(token_rows=...)`
    pissa.py            a start from W's largest singular values    `LoRAConfig(init="pissa")`
    adalora.py          training chooses the ranks                  `AdaLoRAConfig`
    adalora_files.py    its files                                   `as_lora`: to plain LoRA
    lora_plus.py        B learns faster than A                      `minilora.parameter_groups`
    prompt_tuning.py    vectors before the input embeddings train   `PromptConfig`
    prefix_tuning.py    keys and values in the attentions train     `PrefixConfig`
    virtual_tokens.py   what these two share; their files are in virtual_tokens_files.py
    together.py         several of these in one model               `minilora.inject` of a list

A prompt and a prefix adapt no layer. Each is an extra with a configuration of its own, held in the
field `prompts` of LoRAConfig. `start` adds the parameters and the forward hooks, `find` names them
for the files, and `swap` switches them off and on. Their kinds read and write a subdirectory of the
adapter's directory (`FOLDERS`, in peft_format/keys.py). They cannot be merged: `merge` reports
that, and `unwrap` refuses.
"""

from minilora.initialization import STARTS
from minilora.inject import DEQUANTIZERS, EXTRAS, LAYERS
from minilora.methods import adalora, adalora_files, pissa
from minilora.methods.adalora import AdaLoRAConfig as AdaLoRAConfig
from minilora.methods.adalora_files import as_lora as as_lora
from minilora.methods.dora import DoRALinear
from minilora.methods.lora_bias import LoRABiasLinear
from minilora.methods.prefix_tuning import PrefixConfig as PrefixConfig
from minilora.methods.prefix_tuning import PrefixTuning
from minilora.methods.prompt_tuning import PromptConfig as PromptConfig
from minilora.methods.prompt_tuning import PromptTuning
from minilora.methods.token_rows import TokenRows
from minilora.methods.virtual_tokens_files import PREFIX, PROMPT
from minilora.nf4.loftq import loftq
from minilora.nf4.model import dequantized
from minilora.peft_format.apply import CONVERSIONS, SavePretrained
from minilora.peft_format.config import KINDS
from minilora.trained_whole import TrainedWhole

LAYERS.update(dora=DoRALinear, lora_bias=LoRABiasLinear)
LAYERS.update(pissa=pissa.PiSSALinear, adalora=adalora.AdaLoRALinear)
STARTS.update(loftq=loftq, pissa=pissa.refuse)
EXTRAS.extend((TrainedWhole, TokenRows, SavePretrained, adalora.Allocation))
EXTRAS.extend((PromptTuning, PrefixTuning))
KINDS.update(ADALORA=adalora_files.KIND, PROMPT_TUNING=PROMPT)
KINDS.update(PREFIX_TUNING=PREFIX, MINILORA_PREFIX=PREFIX)
CONVERSIONS.update(pissa=pissa.as_lora)
DEQUANTIZERS.append(dequantized)
