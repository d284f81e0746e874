"""Reading and writing a prompt or a prefix in PEFT's format.

    prompt/    PROMPT_TUNING      prompt_embeddings (m, d)
    prefix/    PREFIX_TUNING      prompt_embeddings (m, layers 2 d), of the decoder's attention
               MINILORA_PREFIX    encoder, decoder, cross (m, layers 2 d): PEFT refuses this type

For an encoder-decoder PEFT 0.21.2 does not use all that it stores. A prompt has 2 m rows, and PEFT
uses the first m. Of a prefix, PEFT gives every second pair (key, value), 0, 2, 4.., to the layers
of the decoder in turn, and starts over at the end. So a prefix is written with a layer of zeros
after each of its own, and PEFT then computes what minilora does.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from minilora.config import LoRAError, check
from minilora.methods.prefix_tuning import PrefixConfig
from minilora.methods.prompt_tuning import PromptConfig
from minilora.methods.virtual_tokens import ENCODER_DECODER
from minilora.peft_format import keys
from minilora.peft_format.config import Kind

KEY, OWN_TYPE = "prompt_embeddings", "MINILORA_PREFIX"
Entries = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
KNOWN = {
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "places",
    "auto_mapping", "peft_version", "num_virtual_tokens", "token_dim", "num_attention_heads",
    "num_layers", "num_transformer_submodules", "prompt_tuning_init", "prompt_tuning_init_text",
    "tokenizer_name_or_path", "tokenizer_kwargs", "encoder_hidden_size", "prefix_projection",
    "init_weights",
}  # fmt: skip
"""Entries of PEFT's file that are read, or that concern only the start of training."""


def write_prompt(config: PromptConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """PEFT's entries and tensors, from P (m, d)."""
    P = tensors[f"prompt/{KEY}"]
    entries = {
        "peft_type": "PROMPT_TUNING", "task_type": config.task_type, "inference_mode": True,
        "num_virtual_tokens": P.shape[0], "token_dim": P.shape[1],
        "num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM",
    }  # fmt: skip
    return entries, {KEY: P}


def read_prompt(entries: Entries, tensors: Tensors) -> tuple[PromptConfig, dict[str, Tensor]]:
    """The configuration, and P (m, d) by its name in `find`."""
    m, d = _counts(entries, "num_virtual_tokens", "token_dim")
    _refuse_unlike(tensors, {KEY: (m * _submodules(entries), d)})
    config = PromptConfig(length=m, task_type=entries.get("task_type"))
    return config, {f"prompt/{KEY}": tensors[KEY][:m]}


def write_prefix(config: PrefixConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """PEFT's entries and tensors, from P (m, layers, 2, heads, width) of each place."""
    found = {place: tensors[f"prefix/{place}"] for place in config.places}
    m, layers, _, heads, width = next(iter(found.values())).shape
    entries: dict[str, Any] = {
        "task_type": config.task_type, "inference_mode": True, "num_virtual_tokens": m,
        "token_dim": heads * width, "num_attention_heads": heads,
    }  # fmt: skip
    if config.places != ("decoder",):
        entries |= {"peft_type": OWN_TYPE, "places": list(config.places)}
        return entries, {place: P.flatten(1) for place, P in found.items()}
    s = _submodules(entries)
    pairs = found["decoder"].flatten(2)[:, :, None]  # (m, layers, 1, 2 d)
    entries |= {"peft_type": "PREFIX_TUNING", "num_layers": s * layers, "prefix_projection": False}
    entries |= {"num_transformer_submodules": s}
    return entries, {KEY: F.pad(pairs, (0, 0, 0, s - 1)).flatten(1)}  # (m, layers s 2 d)


def read_prefix(entries: Entries, tensors: Tensors) -> tuple[PrefixConfig, dict[str, Tensor]]:
    """The configuration, and P of each place by its name in `find`."""
    m, d, heads = _counts(entries, "num_virtual_tokens", "token_dim", "num_attention_heads")
    own = entries["peft_type"] == OWN_TYPE
    places = entries.get("places", ()) if own else ("decoder",)
    config = PrefixConfig(m, places, None, entries.get("task_type"))  # no MLP: it was folded into P
    places = config.places
    if own:  # the number of layers follows from the tensors; a model checks it later
        ends = {place: tensors[place].shape[-1:].numel() for place in places if place in tensors}
        shapes = {place: (m, max(1, ends.get(place, 1) // (2 * d)) * 2 * d) for place in places}
    else:
        shapes = {KEY: (m, _counts(entries, "num_layers")[0] * 2 * d)}
    _refuse_unlike(tensors, shapes)
    if d % heads:
        raise LoRAError(f"token_dim {d} is no multiple of num_attention_heads {heads}")
    found = {key: tensors[key].view(m, -1, 2, heads, d // heads) for key in shapes}
    if not own:
        n, s = found[KEY].shape[1], _submodules(entries)
        found = {"decoder": found[KEY][:, [s * layer % n for layer in range(n)]]}
    return config, {f"prefix/{place}": P for place, P in found.items()}


PROMPT = Kind(PromptConfig, {}, read_prompt, write_prompt)
PREFIX = Kind(PrefixConfig, {}, read_prefix, write_prefix)


def _counts(entries: Entries, *names: str) -> list[int]:
    """The named entries, whole numbers of at least 1; unknown entries are refused."""
    for key, value in entries.items():
        if key not in KNOWN and value not in (None, False, "none", [], {}):
            raise LoRAError(f"{key} is {value!r}: minilora does not do this: use it with PEFT")
    for name in names:
        check(name, entries.get(name), "rank")
    return [entries[name] for name in names]


def _submodules(entries: Entries) -> int:
    """PEFT's num_transformer_submodules: 2 for an encoder-decoder unless the file says 1."""
    value = entries.get("num_transformer_submodules")
    if value in (None, "", [], {}):
        return 2 if entries.get("task_type") == ENCODER_DECODER else 1
    if type(value) is not int or value not in (1, 2):
        raise LoRAError(f"num_transformer_submodules must be 1 or 2, not {value!r}")
    return value


def _refuse_unlike(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {key: (shape, True) for key, shape in shapes.items()}
    keys.refuse("the tensors are wrong", keys.compare(expected, tensors, lambda key: ""))
