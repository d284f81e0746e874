"""Which modules are adapted: PEFT's rules of matching, with every slip of the pen reported."""

import re
from collections import defaultdict
from difflib import get_close_matches

from torch import nn

from minilora import bases
from minilora.config import LoRAConfig, LoRAError

ALL_LINEAR = "all-linear"

# These read the weights of their linears behind the linears' backs: an adapter in there would be
# trained by nobody and heard by nobody.
BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def matches(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a dotted module name is meant by `names`.

    A string is a regular expression for the whole name; in a sequence each entry is the exact name
    or its end after a dot.
    """
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def layer_index(module: str, patterns: tuple[str, ...] = ()) -> int | None:
    """The index of the layer a module lies in: the first `.name.<index>.` of its dotted name.

    Example:
        >>> layer_index("model.decoder.layers.3.self_attn.q_proj")
        3
    """
    for pattern in patterns or (r"[^.]*",):
        # Without patterns PEFT wants a dot before the name too: `h.0.attn` alone has no index.
        start = r"(?:^|.*?\.)" if patterns else r".*?\."
        if found := re.match(rf"{start}{pattern}\.(\d+)\.", module):
            return int(found.group(1))
    return None


def is_target(config: LoRAConfig, module: str) -> bool:
    """Whether the configuration asks for this module name (`all-linear` is resolved elsewhere)."""
    if config.exclude and matches(config.exclude, module):
        return False
    if not matches(config.targets, module):
        return False
    return config.layers is None or layer_index(module, config.layers_pattern) in config.layers


def select(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules to wrap, by dotted name, in the model's order. A module with two names is once.

    Raises:
        LoRAError: an entry of targets, exclude, layers or a pattern matches nothing (the nearest
            names are shown), a match is not a linear layer, shares its weight with another module,
            or lies in a module that would bypass it.
    """
    if config.targets == ALL_LINEAR:
        head = output_head(model)
        candidates = {
            name: module
            for name, module in model.named_modules()
            if name and bases.is_linear(module) and module is not head
        }
        excluded = {name for name in candidates if matches(config.exclude, name)}
        found = {name: m for name, m in candidates.items() if name not in excluded}
    else:
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        _require_matches(config, names)
        found = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if name and is_target(config, name) and not any(module is m for m in found.values()):
                found[name] = module
    if not found:
        raise LoRAError("nothing left to adapt: `exclude` or `layers` rules out every target")
    check_modules(model, found)
    _check_patterns(config, list(found))
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """The head that turns hidden states into logits, where the model names one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def nearest(name: str, known: list[str], count: int = 3) -> str:
    """'; nearest: a, b, c', by the last part of the name and by the whole, or nothing."""
    ends = list(dict.fromkeys(k.rsplit(".", 1)[-1] for k in known))
    close = get_close_matches(name, ends, count, 0.5) or get_close_matches(name, known, count, 0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


def _require_matches(config: LoRAConfig, names: list[str]) -> None:
    """Every entry a person wrote must mean something: PEFT lets a misspelt one pass."""
    for field in ("targets", "exclude"):
        entries = getattr(config, field)
        for entry in (entries,) if isinstance(entries, str) and entries else entries:
            wanted = entry if isinstance(entries, str) else (entry,)
            if not any(matches(wanted, name) for name in names):
                linear = "nothing matches it in the model"
                raise LoRAError(f"{field}: {entry!r}: {linear}{nearest(entry, names)}")
    for index in config.layers or ():
        if all(layer_index(name, config.layers_pattern) != index for name in names):
            raise LoRAError(f"layers: the model has no layer {index}")


def _check_patterns(config: LoRAConfig, modules: list[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in modules):
                raise LoRAError(
                    f"{field}: {key!r} matches none of the adapted modules{nearest(key, modules)}"
                )


def check_modules(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Refuse what is no linear layer, would be bypassed, or shares its weight.

    Raises:
        LoRAError: one of the found modules cannot be adapted; it is named, with the reason.
    """
    owners: dict[int, list[str]] = defaultdict(list)  # parameter -> the modules that hold it
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    for name, module in found.items():
        if not bases.is_linear(module):
            raise LoRAError(
                f"targets: {name} is a {type(module).__name__}, not a linear layer; "
                "name the linears inside or beside it"
            )
        for ancestor in _ancestors(model, name):
            if isinstance(ancestor, BYPASSING):
                raise LoRAError(
                    f"targets: {name} lies in a {type(ancestor).__name__}, which reads the weight "
                    "without calling the layer: the adapter would be ignored; exclude it"
                )
        weight = getattr(module, "weight", None)
        if weight is not None and len(shared := owners[id(weight)]) > 1:
            others = ", ".join(other for other in shared if other != name)
            raise LoRAError(
                f"targets: {name} shares its weight with {others}: merging would change both; "
                "exclude it, or untie the weights first"
            )


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
