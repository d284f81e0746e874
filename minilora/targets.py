"""Which modules are adapted: PEFT's rules of matching, with every slip of the pen reported."""

import re
from collections import defaultdict
from difflib import get_close_matches

from torch import Tensor, nn

from minilora import bases
from minilora.config import ALL_LINEAR, LoRAConfig, LoRAError, matches, matches_end

# These read the weights of their linears behind the linears' backs: an adapter in there would be
# trained by nobody and heard by nobody.
BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def layer_index(module: str, patterns: tuple[str, ...] = ()) -> int | None:
    """The index of the layer a module lies in: the first `.name.<index>.` of its dotted name.

    Example:
        >>> layer_index("model.decoder.layers.3.self_attn.q_proj")
        3
    """
    for pattern in patterns or (r"[^.]*",):
        # Without patterns PEFT wants a dot before the name too: `h.0.attn` alone has no index.
        start = r"(?:^|.*?\.)" if patterns else r".*?\."
        if found := re.match(rf"{start}{pattern}\.(?P<index>\d+)\.", module):
            return int(found["index"])
    return None


def is_excluded(config: LoRAConfig, module: str) -> bool:
    """Whether a module is left alone: named by `exclude`, or part of one that trains whole."""
    if config.exclude and matches(config.exclude, module):
        return True
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.also_train)


def is_target(config: LoRAConfig, module: str) -> bool:
    """Whether the configuration asks for this module name (`all-linear` is resolved elsewhere)."""
    if is_excluded(config, module) or not matches(config.targets, module):
        return False
    if config.layers is None or module in config.targets:  # one named in full is always meant
        return True
    return layer_index(module, config.layers_pattern) in config.layers


def select(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules to wrap, by dotted name, in the model's order. A module with two names is once.

    Raises:
        LoRAError: an entry of targets, exclude, layers or a pattern matches nothing (the nearest
            names are shown), a match is not a linear layer, shares its weight with another module,
            or lies in a module that would bypass it.
    """
    named = [
        (bases.plain_name(name), module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name
    ]
    names = [name for name, _ in named]
    _require_matches(config, names)
    if config.targets == ALL_LINEAR:
        head = output_head(model, config.task_type)
        candidates = {
            bases.plain_name(name): module
            for name, module in model.named_modules()
            if name and bases.is_linear(module) and module is not head
        }
        found = {name: m for name, m in candidates.items() if not is_excluded(config, name)}
    else:
        found = {}
        for name, module in named:
            if is_target(config, name) and not any(module is m for m in found.values()):
                found[name] = module
    if not found:
        raise LoRAError("nothing left to adapt: `exclude` or `layers` rules out every target")
    check_modules(model, found)
    _check_patterns(config, list(found))
    return found


def output_head(model: nn.Module, task_type: str | None = None) -> nn.Module | None:
    """The head that turns hidden states into logits, where the model names one.

    A sequence classifier does not; PEFT goes by the usual names.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None and task_type == "SEQ_CLS":
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head if isinstance(head, nn.Module) else None


def nearest(name: str, known: list[str], count: int = 3) -> str:
    """'; nearest: a, b, c', by the last part of the name and by the whole, or nothing."""
    ends = list(dict.fromkeys(k.rsplit(".", 1)[-1] for k in known))
    close = get_close_matches(name, ends, count, 0.5) or get_close_matches(name, known, count, 0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


def _require_matches(config: LoRAConfig, names: list[str]) -> None:
    """Every entry a person wrote must mean something: PEFT lets a misspelt one pass."""
    for entry in config.also_train:
        if not any(name.endswith(entry) for name in names):
            nothing = "nothing matches it in the model"
            raise LoRAError(f"also_train: {entry!r}: {nothing}{nearest(entry, names)}")
    for field in ("targets", "exclude"):
        entries = getattr(config, field)
        if field == "targets" and entries == ALL_LINEAR:
            continue
        for entry in (entries,) if isinstance(entries, str) and entries else entries:
            wanted = entry if isinstance(entries, str) else (entry,)
            if not any(matches(wanted, name) for name in names):
                linear = "nothing matches it in the model"
                raise LoRAError(f"{field}: {entry!r}: {linear}{nearest(entry, names)}")
    targets = [name for name in names if matches(config.targets, name)]
    for index in config.layers or ():
        if all(layer_index(name, config.layers_pattern) != index for name in targets):
            raise LoRAError(f"layers: no target lies in a layer {index}")


def _check_patterns(config: LoRAConfig, modules: list[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(matches_end(key, name) for name in modules):
                raise LoRAError(
                    f"{field}: {key!r} matches none of the adapted modules{nearest(key, modules)}"
                )


def check_modules(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Refuse what is no linear layer, would be bypassed, is quantized, or shares its weight.

    Raises:
        LoRAError: one of the found modules cannot be adapted; it is named, with the reason.
    """
    owners: dict[int, list[str]] = defaultdict(list)  # storage -> the modules that hold it
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[_storage(parameter)].append(bases.plain_name(name))
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
        try:
            bases.adapter_placement(module)
        except LoRAError as error:
            raise LoRAError(f"targets: {name}: {error}") from None
        weight = getattr(module, "weight", None)
        if weight is not None and len(shared := owners[_storage(weight)]) > 1:
            others = ", ".join(other for other in shared if other != name)
            raise LoRAError(
                f"targets: {name} shares its weight with {others}: merging would change both; "
                "exclude it, or untie the weights first"
            )


def _storage(weight: Tensor) -> int:
    """Where a weight lies: two parameters can be views of one storage (none on the meta device)."""
    return weight.data_ptr() or id(weight)


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    named = model.named_modules(remove_duplicate=False)
    return [m for n, m in named if not n or name.startswith(f"{bases.plain_name(n)}.")]
