"""Files of AdaLoRA: PEFT's ADALORA is read and written; `as_lora` converts to plain LoRA."""

from collections import Counter
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from minilora.config import LoRAConfig, LoRAError, check
from minilora.methods.adalora import AdaLoRAConfig
from minilora.peft_format.config import FIELDS, Kind, resolve
from minilora.peft_format.directory import Adapter
from minilora.peft_format.keys import PREFIX, SUFFIXES, is_beside


def read(entries: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """PEFT's file with the keys and shapes of LoRA's; ranks that it leaves out return as zeros."""
    entries = {key: value for key, value in entries.items() if value is not None}
    r, masks = entries.get("init_r", 12), entries.get("rank_pattern", {})
    check("init_r", r, "rank")
    if not isinstance(masks, dict):
        raise LoRAError(f"rank_pattern must name the ranks kept, not {masks!r}")
    found = {}
    for key, tensor in tensors.items():
        module, _, end = key.removeprefix(PREFIX).rpartition(".")
        if end in ("lora_A", "lora_B", "lora_E"):
            key = PREFIX + module + SUFFIXES[end]
            if (mask := masks.get(f"{module}.lora_E")) is not None:
                tensor = put_in(tensor, mask, r, int(end == "lora_B"))
        found[key] = tensor
    check("lora_alpha", alpha := entries.get("lora_alpha", 8), "alpha")
    said = {"rank_pattern": None, "lora_alpha": round(alpha * r / (r + EPSILON), 9)}
    if entries.get("target_r", 8) == 8:
        said["target_r"] = min(8, r)  # PEFT's default is 8, whatever init_r is
    return entries | said, found


def put_in(tensor: Tensor, mask: Any, r: int, side: int) -> Tensor:
    """The tensor with all r ranks along dimension `side`, zero where the mask, of bools, is False.

    Raises:
        LoRAError: mask and tensor do not fit together.
    """
    mask = mask if isinstance(mask, list) else []
    places = [i for i, kept in enumerate(mask) if kept is True]
    if len(mask) != r or tensor.dim() != 2 or tensor.shape[side] != len(places):
        raise LoRAError(f"rank_pattern keeps {len(places)} of {r} ranks; its tensors do not")
    shape = [r if dim == side else size for dim, size in enumerate(tensor.shape)]
    return tensor.new_zeros(shape).index_copy_(side, torch.tensor(places).long(), tensor)


def write(entries: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The inverse of `read`. Pruned ranks stay in the file, with a lambda of zero."""
    r = entries["init_r"]
    found = {key.replace("lora_A.weight", "lora_A"): tensor for key, tensor in tensors.items()}
    found = {key.replace("lora_B.weight", "lora_B"): tensor for key, tensor in found.items()}
    return entries | {"lora_alpha": entries["lora_alpha"] * (r + EPSILON) / r}, found


EPSILON = 1e-5
"""PEFT adds this to r when it computes the scale."""
KIND = Kind(
    AdaLoRAConfig,
    {name: entry for name, entry in FIELDS.items() if name != "rank"}
    | {
        "rank": ("init_r", 12), "target_rank": ("target_r", 8), "total_steps": ("total_step", None),
        "initial_steps": ("tinit", 0), "final_steps": ("tfinal", 0), "interval": ("deltaT", 1),
        "beta1": ("beta1", 0.85), "beta2": ("beta2", 0.85),
        "orthogonality": ("orth_reg_weight", 0.5),
    },
    read,
    write,
)  # fmt: skip


def as_lora(adapter: Adapter) -> Adapter:
    """Plain LoRA that computes the same: A is diag(lambda) Q and B is P, without the zero ranks.

    `rank_pattern` gives each module the rank that training chose, `alpha_pattern` the scale that it
    had. A module of rank 0 is left out: it computes what the base computes.

    Args:
        adapter: as `read_adapter` reads it. An adapter of another method is returned unchanged.

    Raises:
        LoRAError: every lambda is zero, as before training, and no rank is left.

    Example:
        >>> config = AdaLoRAConfig(rank=3, target_rank=1, total_steps=9, alpha=6, targets=("fc",))
        >>> tensors = {"lora_A": torch.ones(3, 4), "lora_B": torch.ones(2, 3)}
        >>> tensors["lora_E"] = torch.tensor([[0.5], [0.0], [2.0]])
        >>> named = {f"{PREFIX}fc{SUFFIXES[name]}": t for name, t in tensors.items()}
        >>> plain = as_lora(Adapter(config, named))
        >>> plain.config.rank_of("fc"), plain.scale_of("fc"), plain.pair("fc")[0].tolist()
        (2, 2.0, [[0.5, 0.5, 0.5, 0.5], [2.0, 2.0, 2.0, 2.0]])
    """
    config = adapter.config
    if not isinstance(config, AdaLoRAConfig):
        return adapter
    tensors = {PREFIX + name: tensor for name, tensor in adapter.extras.items()}
    tensors |= {key: tensor for key, tensor in adapter.tensors.items() if is_beside(key)}
    ranks = {}
    for module in adapter.modules:
        Q, P, lambda_ = (adapter.parameters(module)[n] for n in ("lora_A", "lora_B", "lora_E"))
        kept = lambda_[:, 0].nonzero()[:, 0]
        if len(kept):
            ranks[module] = len(kept)
            tensors[PREFIX + module + SUFFIXES["lora_A"]] = (lambda_ * Q)[kept]
            tensors[PREFIX + module + SUFFIXES["lora_B"]] = P[:, kept]
    if not ranks and not config.prompts:
        raise LoRAError("every lambda of the adapter is zero, as before training: train it first")
    values = {field.name: getattr(config, field.name) for field in fields(LoRAConfig)}
    if len(ranks) < len(adapter.modules):
        values |= {"targets": tuple(ranks), "exclude": (), "layers": None, "layers_pattern": ()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = resolve(ranks.__getitem__, tuple(ranks), rank)
    scales = {name: config.alpha * r / config.rank for name, r in pattern.items()}
    values |= {"rank": rank, "rank_pattern": pattern, "alpha": config.alpha * rank / config.rank}
    plain = LoRAConfig(**values | {"alpha_pattern": scales})
    return Adapter(plain, tensors, adapter.base_model, adapter.fan_in_fan_out)
