"""PEFT's adapter_config.json, to and from LoRAConfig. What minilora lacks is an error.

The rules were read in PEFT 0.21.2; the file has been the same since its first versions.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from minilora.config import ALL_LINEAR, ATTENTION, LoRAConfig, LoRAError, check_regex, matches_end
from minilora.modules import naming
from minilora.peft_format.keys import CONFIG_FILE

Pattern = dict[str, Any]

# LoRAConfig's field -> PEFT's. No entry, or null, means PEFT's default, given here.
FIELDS: dict[str, tuple[str, Any]] = {
    "rank": ("r", 8), "alpha": ("lora_alpha", 8), "dropout": ("lora_dropout", 0.0),
    "targets": ("target_modules", None), "exclude": ("exclude_modules", None),
    "layers": ("layers_to_transform", None), "layers_pattern": ("layers_pattern", None),
    "rank_pattern": ("rank_pattern", {}), "alpha_pattern": ("alpha_pattern", {}),
    "rslora": ("use_rslora", False), "dora": ("use_dora", False), "bias": ("bias", "none"),
    "lora_bias": ("lora_bias", False), "also_train": ("modules_to_save", None),
    "init": ("init_lora_weights", True), "task_type": ("task_type", None),
    "token_rows": ("trainable_token_indices", None),
}  # fmt: skip
# Older versions of PEFT do not know these.
NEWER = ("exclude_modules", "lora_bias", "trainable_token_indices")
INITS = {"kaiming": True, "random": False} | {n: n for n in ("gaussian", "loftq", "pissa")}
# PEFT quantizes the base again when it loads such a file. After one step it is NF4 of the weight.
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}
# By JSON text. The named ones leave the base alone: once trained, nothing tells them apart.
OTHER_INITS = dict.fromkeys(('"eva"', '"orthogonal"', '"mica"'), "kaiming")

# Entries that change nothing about the weights.
IGNORED = {
    "peft_type", "peft_version", "r", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
ADVICE = "merge it into the base with PEFT (merge_and_unload) where PEFT can, else use it with PEFT"


class Kind(NamedTuple):
    """A `peft_type`: its configuration, and how its files are read and written."""

    config: type[Any]
    """LoRAConfig, a subclass of it, or a configuration of its own such as PromptConfig."""
    fields: dict[str, tuple[str, Any]]
    """As `FIELDS`; empty for a prompt or prefix, whose `read` returns the configuration."""
    read: Callable[..., Any] = lambda entries, tensors: (entries, tensors)
    """(entries, tensors) of a file -> the same with the names and shapes of LoRA's."""
    write: Callable[..., Any] = read
    """The inverse of `read`."""


KINDS = {"LORA": Kind(LoRAConfig, FIELDS)}
"""By `peft_type`. `minilora/methods/__init__.py` adds those of other methods."""


def kind_of(entries: Mapping[str, Any]) -> Kind:
    """The kind of a file with these entries.

    Raises:
        LoRAError: minilora does not know its `peft_type`.
    """
    name = entries.get("peft_type")
    if (kind := KINDS.get(str(name))) is None:
        raise LoRAError(f"peft_type is {name!r}; minilora reads {', '.join(KINDS)} only: {ADVICE}")
    return kind


@naming(CONFIG_FILE)
def config_from_peft(entries: Mapping[str, Any], modules: tuple[str, ...]) -> LoRAConfig:
    """The configuration that PEFT's entries mean.

    Args:
        entries: the parsed file.
        modules: the modules that the adapter's tensors name: the targets where none are given.

    Raises:
        LoRAError: an entry is wrong, or asks for something that minilora does not do.
    """
    kind = kind_of(entries)
    known = {name for name, _ in kind.fields.values()} | IGNORED
    for key, value in entries.items():
        if key not in known and value not in (None, False, "none", [], {}):
            raise LoRAError(f"{key} is {value!r}: minilora does not do this: {ADVICE}")
    values = {}
    for ours, (peft, default) in kind.fields.items():
        value = default if entries.get(peft) is None else entries[peft]
        if default not in (None, {}) or value not in (None, [], {}, ""):  # PEFT writes these alike
            values[ours] = value
    values["targets"] = values.get("targets") or modules
    if isinstance(rows := values.get("token_rows"), Mapping):
        if len(rows) > 1:
            raise LoRAError(f"trainable_token_indices has several, {', '.join(rows)}: {ADVICE}")
        (values["token_rows"],) = rows.values()  # the tensor's name identifies the embedding
    values["init"] = _init_from_peft(values["init"])
    if values["init"] == "loftq" and (entries.get("loftq_config") or LOFTQ) != LOFTQ:
        raise LoRAError(f"loftq_config must be {LOFTQ}: no other is supported")
    config: LoRAConfig = kind.config(**values)
    for name in config.also_train:  # PEFT puts it into this expression
        check_regex("modules_to_save", name, r"(^|.*\.){}($|\..*)")
    return config


def config_to_peft(config: LoRAConfig, modules: tuple[str, ...]) -> dict[str, Any]:
    """PEFT's entries, only those that its older versions know too, unless they are needed."""
    ((name, kind),) = ((n, k) for n, k in KINDS.items() if k.config is type(config))
    values = {field: getattr(config, field) for field in kind.fields}
    if config.targets in (ALL_LINEAR, ATTENTION):
        values["targets"] = modules  # which linears, said outright
    values["alpha"] = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    values["rank_pattern"] = resolve(config.rank_of, modules, config.rank)
    values["alpha_pattern"] = resolve(config.alpha_of, modules, config.alpha)
    values["init"] = INITS[config.init]
    entries: dict[str, Any] = {"peft_type": name, "inference_mode": True}
    for ours, (peft, _) in kind.fields.items():
        if values[ours] or peft not in NEWER:
            entries[peft] = None if values[ours] == () else values[ours]
    return entries | ({"loftq_config": LOFTQ} if config.init == "loftq" else {})


def _init_from_peft(value: object) -> str:
    inits = {json.dumps(peft): ours for ours, peft in INITS.items()} | OTHER_INITS
    if (text := json.dumps(value).lower()) in inits:
        return inits[text]
    convert = "convert it with PEFT: save_pretrained(path_initial_model_for_weight_conversion=...)"
    raise LoRAError(f"init_lora_weights {value!r} may have rewritten the base's weights: {convert}")


def resolve(value_of: Callable[[str], Any], modules: tuple[str, ...], default: Any) -> Pattern:
    """A pattern with one full name per module, so that no order of keys can change its meaning.

    PEFT sorts the keys when it saves; overlapping patterns then reload with other values.
    """
    names = {name: value_of(name) for name in modules}
    pattern = {name: value for name, value in names.items() if value != default}
    pairs = ((name, key) for name in names for key in pattern if matches_end(key, name))
    if all(names[name] == pattern[key] for name, key in pairs):
        return pattern
    # A full name is also the end of another: anchor them.
    return {f"^{re.escape(name)}": value for name, value in pattern.items()}
