"""Conventions of other libraries: the names that torch, transformers and PEFT give to modules.

Only torch is imported. The others' classes are recognized by names and attributes.
"""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from minilora.config import ATTENTION, LoRAConfig, LoRAError, matches
from minilora.modules import named_modules, path, plain_model

BYPASSING = re.compile(
    r"torch\.nn\..*\.(MultiheadAttention|TransformerEncoderLayer)\..*"
    r"|transformers\..*\.(WavLMAttention\.(q|k|v|out)_proj|(Falcon|Jamba|)MambaMixer\.dt_proj)"
    r"|transformers\..*\.((Falcon|Zamba2)?Mamba|\w*Mamba2|FalconH1|Bamba)Mixer\.out_proj"
    r"|transformers\..*\.((Falcon)?MambaMixer\.x_proj|GraniteMoeHybridMambaLayer\.out_proj)"
    r"|transformers\..*\.\w*MHAttentionMap\.k_(proj|linear)"
)
"""Class and linear where the class reads the weight without calling the linear, always or on a GPU:
an adapter on it gets no gradient and has no effect."""

OWN_FORWARD = ("Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear")
"""Subclasses of nn.Linear, in transformers, that do not return x W^T + b."""

PROJECTIONS = (
    ("q_proj", "v_proj"), ("q", "v"), ("query", "value"), ("query_proj", "value_proj"),
    ("q_lin", "v_lin"), ("c_attn",), ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("in_proj",),
)  # fmt: skip
"""Names of the query and value linears by model family: BART and Llama, T5, BERT, ProphetNet and
DeBERTa, DistilBERT. GPT-2, GPT-NeoX, Phi-3, ModernBERT and the first DeBERTa have one for all."""

HEADS = {
    "SEQ_CLS": ("classifier", "score", "classification_head"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task type -> the ends of the names of the heads that PEFT trains whole (DistilBERT also has a
pre_classifier), and of BART's head, which PEFT leaves out."""


def bypassed(named: dict[str, nn.Module], linear: str) -> str:
    """Why the linear takes no adapter: "lies in a KIND, which ..." or "is a KIND"; "" if it does.

    `named` has the modules of the model by name, and the model itself by "".
    """
    if (kind := type(named[linear]).__name__) in OWN_FORWARD:
        return f"is a {kind}, which does not return x W^T + b"
    end = linear.rpartition(".")[2]
    for around in [type(named[name]) for name in ["", *path(linear)[:-1]] if name in named]:
        if any(BYPASSING.fullmatch(f"{c.__module__}.{c.__name__}.{end}") for c in around.__mro__):
            return f"lies in a {around.__name__}, which reads the weight without calling the layer"
    return ""


def embeddings(model: nn.Module) -> list[Any]:
    """The input embeddings and the output head of a model; None for each that it does not name."""
    try:
        return [getattr(model, f"get_{e}_embeddings", lambda: None)() for e in ("input", "output")]
    except NotImplementedError:  # transformers raises it for models of audio or images
        return [None, None]


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard has split the parameters over the processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def refuse_wrapped(model: nn.Module, needs_values: bool = False) -> None:
    """Refuse a model whose modules may no longer be replaced, or take no values.

    Raises:
        LoRAError: the model is wrapped or sharded, its weights are offloaded (with `needs_values`,
            or only shapes), or it carries an adapter of PEFT.
    """
    # accelerate leaves offloaded weights on the meta device; its hooks copy them for each call.
    away = [m for m in model.modules() if needs_values or hasattr(m, "_hf_hook")]
    if any(parameter.is_meta for module in away for parameter in module.parameters()):
        raise LoRAError("weights are offloaded or on the meta device: load all onto one device")
    if is_sharded(model) or plain_model(model) is not model:
        raise LoRAError("inject before torch.compile, DistributedDataParallel or fully_shard")
    if any(k.__module__.startswith("peft.") for m in model.modules() for k in type(m).__mro__):
        raise LoRAError("PEFT's adapter is in the model: take model.unload() or merge_and_unload()")


def completed(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The configuration with what depends on the model: the projections' names, the task's head.

    Raises:
        LoRAError: as in `refuse_wrapped`; the model carries an adapter of minilora; it has no
            projections with a known name; or a whole module or bias would train in half precision.
    """
    refuse_wrapped(model)
    if hasattr(model, "_minilora") or any(hasattr(module, "lora_A") for module in model.modules()):
        raise LoRAError("the model carries an adapter already: minilora.unwrap(model) first")
    targets = projections(model) if config.targets == ATTENTION else config.targets
    head = sorted(n for n in _ends(model) if n.endswith(HEADS.get(config.task_type or "", ())))
    also_train = tuple(dict.fromkeys((*config.also_train, *head)))  # each once
    refuse_half(model, config := replace(config, targets=targets, also_train=also_train))
    return config


def refuse_part(model: nn.Module) -> None:
    """Refuse a model of which one part carries the adapter, since the part has its record.

    Raises:
        LoRAError: it names the part.
    """
    for name, module in named_modules(plain_model(model)):
        if "_minilora" in vars(module):
            raise LoRAError(f"{name} carries the adapter, not the whole model: pass that module")


def refuse_half(model: nn.Module, config: LoRAConfig) -> None:
    """Refuse to train whole modules and biases in half precision.

    Raises:
        LoRAError: a parameter among them has less than 32 bits.
    """
    for name, p in model.named_parameters():
        whole = any(matches(config.also_train, part) for part in path(name))
        if p.dtype.itemsize < 4 and (whole or (config.bias != "none" and name.endswith("bias"))):
            what = f"{name} cannot train: in {p.dtype} small steps are lost: call .float() on its"
            raise LoRAError(f"{what} module and use torch.autocast, or load with inference=True")


def projections(model: nn.Module) -> tuple[str, ...]:
    """What "attention" means in a model: the names of its query and value linears.

    Raises:
        LoRAError: the model has none with a known name.
    """
    ends = _ends(model)
    found = tuple(name for names in PROJECTIONS if ends.issuperset(names) for name in names)
    if not found:
        raise LoRAError(f"targets: {ATTENTION!r}: no known projections: name the linears")
    return found


def _ends(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in model.named_modules()}
