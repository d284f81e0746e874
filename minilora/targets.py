"""Which modules are adapted: PEFT's rules, and an error for every entry that matches nothing."""

from collections.abc import Callable, Iterable

from torch import nn

from minilora import conventions, linears, modules
from minilora.config import ALL_LINEAR, LoRAConfig, LoRAError, is_named, matches, matches_end

Matcher = Callable[[str, str], bool]
"""(entry, module): whether the entry selects the module."""


def trained_whole(config: LoRAConfig, module: str) -> str | None:
    """The name of the module of `also_train` that is this one or contains it; None if none does."""
    return next((name for name in modules.path(module) if matches(config.also_train, name)), None)


def is_target(config: LoRAConfig, module: str) -> bool:
    """Whether the configuration asks for a linear of this name.

    "all-linear" asks for any: `all_linear` leaves out the output head.
    """
    asked = config.targets == ALL_LINEAR or matches(config.targets, module)
    if not asked or matches(config.exclude, module) or trained_whole(config, module):
        return False
    if config.layers is None or module in config.targets:  # one named in full is always meant
        return True
    return modules.layer_index(module, config.layers_pattern) in config.layers


def all_linear(model: nn.Module, task_type: str | None = None) -> list[tuple[str, nn.Module]]:
    """The modules of "all-linear": every linear but the output head, by plain name."""
    head = modules.output_head(model, task_type)
    named = modules.named_modules(model)
    return [(name, m) for name, m in named if linears.is_linear(m) and m is not head]


def select(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules to wrap, by dotted name, in the model's order; one with two names is listed once.

    Raises:
        LoRAError: an entry of targets, exclude, layers or a pattern matches nothing (the nearest
            names are shown), a match is not a linear layer, shares its weight with another module,
            or lies in a module that would bypass it.
    """
    named = modules.named_modules(model)
    names = [name for name, _ in named]
    for field in ("targets", "exclude", "also_train"):
        require(field, getattr(config, field), names)
    targets = [name for name in names if matches(config.targets, name)]
    for index in config.layers or ():
        if all(modules.layer_index(name, config.layers_pattern) != index for name in targets):
            raise LoRAError(f"layers: no target lies in a layer {index}")
    if config.targets == ALL_LINEAR:
        named = all_linear(model, config.task_type)
    # One that has two names is wrapped once, by the first that is a target.
    first = {module: name for name, module in reversed(named) if is_target(config, name)}
    selected = {name: module for name, module in named if first.get(module) == name}
    if not selected and config.targets:  # without targets: a prompt or prefix alone
        raise LoRAError("nothing left to adapt: `exclude` or `layers` rules out every target")
    check_modules(model, selected)
    for field in ("rank_pattern", "alpha_pattern"):
        require(field, getattr(config, field), list(selected), matches_end)
    return selected


def require(field: str, entries: Iterable[str], names: list[str], by: Matcher = is_named) -> None:
    """Refuse an entry that matches no module. PEFT lets a misspelt one pass."""
    if isinstance(entries, str):  # one regular expression, or "all-linear"
        entries, by = () if entries in ("", ALL_LINEAR) else (entries,), matches
    regex = " (one string is a regex for the whole name, such as '.*q_proj')"
    part = "'s adapted modules" if by is matches_end else regex * (by is matches)
    for entry in entries:
        if not any(by(entry, name) for name in names):
            near = modules.nearest(entry, names)
            raise LoRAError(f"{field}: {entry!r}: nothing matches it in the model{part}{near}")


def check_modules(model: nn.Module, selected: dict[str, nn.Module]) -> None:
    """Refuse what is no linear layer, would be bypassed, is quantized, or shares its weight.

    Raises:
        LoRAError: one of the modules cannot be adapted; it is named, with the reason.
    """
    owned, named = modules.owners(model), {"": model} | dict(modules.named_modules(model))
    for name, module in selected.items():
        with modules.naming(f"targets: {name}"):
            linears.adapter_placement(module)
        if what := conventions.bypassed(named, name):
            raise LoRAError(f"targets: {name} {what}: exclude it")
        if shared := modules.others(module, owned):
            what = f"targets: {name} shares its weight with {', '.join(shared)}"
            raise LoRAError(f"{what}: merging would change both; exclude it, or untie the weights")
