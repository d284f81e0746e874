"""What other libraries assume of a model: names that torch, transformers and PEFT give to modules.

None but torch is imported: what they are is seen by their names and attributes.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from minilora.config import ATTENTION, LoRAConfig, LoRAError, matches
from minilora.modules import path, plain_model

BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""These read the weights of their linears without calling the linears: an adapter in there gets no
gradient and has no effect."""

PROJECTIONS = (
    ("q_proj", "v_proj"), ("q", "v"), ("query", "value"), ("query_proj", "value_proj"),
    ("q_lin", "v_lin"), ("c_attn",), ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("in_proj",),
)  # fmt: skip
"""How model families name the linears of query and value: BART and Llama, T5, BERT, ProphetNet and
DeBERTa, DistilBERT; GPT-2, GPT-NeoX, Phi-3, ModernBERT and the first DeBERTa have one for all."""

HEADS = {
    "SEQ_CLS": ("classifier", "score", "classification_head"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""How the layers end that PEFT trains whole for a task type (DistilBERT has a pre_classifier); and
BART's, which PEFT leaves out."""


def embeddings(model: nn.Module) -> list[Any]:
    """The layers from token ids to vectors and from those to logits, where the model names them."""
    try:
        return [getattr(model, f"get_{e}_embeddings", lambda: None)() for e in ("input", "output")]
    except NotImplementedError:  # so transformers says that a model of sounds or images has none
        return [None, None]


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard left each process a part of the parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model whose modules must stay as they are.

    Raises:
        LoRAError: another library has wrapped it, or put its adapter into it.
    """
    if is_sharded(model) or plain_model(model) is not model:
        raise LoRAError("inject before torch.compile, DistributedDataParallel or fully_shard")
    if any(k.__module__.startswith("peft.") for m in model.modules() for k in type(m).__mro__):
        raise LoRAError("PEFT's adapter is in the model: take model.unload() or merge_and_unload()")


def completed(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The configuration with what it leaves to the model: names of projections, a task's head.

    Raises:
        LoRAError: as in `refuse_wrapped`; the model carries an adapter of minilora; it has no
            projection of a known name; or what trains whole is in half precision.
    """
    refuse_wrapped(model)
    if hasattr(model, "_minilora") or any(hasattr(module, "lora_A") for module in model.modules()):
        raise LoRAError("the model carries an adapter already: minilora.unwrap(model) first")
    targets = projections(model) if config.targets == ATTENTION else config.targets
    head = sorted(n for n in _ends(model) if n.endswith(HEADS.get(config.task_type or "", ())))
    also_train = tuple(dict.fromkeys((*config.also_train, *head)))  # each once
    refuse_half(model, config := replace(config, targets=targets, also_train=also_train))
    return config


def refuse_half(model: nn.Module, config: LoRAConfig) -> None:
    """Refuse to train whole modules and biases in half precision.

    Raises:
        LoRAError: one of them is.
    """
    for name, p in model.named_parameters():
        whole = any(matches(config.also_train, part) for part in path(name))
        if p.dtype.itemsize < 4 and (whole or (config.bias != "none" and name.endswith("bias"))):
            what = f"{name} cannot train: in {p.dtype} small steps are lost"
            raise LoRAError(f"{what}: call .float() on the module, and train under torch.autocast")


def projections(model: nn.Module) -> tuple[str, ...]:
    """What "attention" means in a model: the names of its linears of query and value.

    Raises:
        LoRAError: it has none of a known name.
    """
    ends = _ends(model)
    found = tuple(name for names in PROJECTIONS if ends.issuperset(names) for name in names)
    if not found:
        raise LoRAError(f"targets: {ATTENTION!r}: no projection of a known name: name the linears")
    return found


def _ends(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in model.named_modules()}
