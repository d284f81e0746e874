"""Inject: wrap the targets and freeze the rest. Unwrap: the plain model again, merged."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from minilora import bases
from minilora.config import LoRAConfig, LoRAError
from minilora.layer import LoRALinear
from minilora.targets import select


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did. Printed: one line of counts, then the modules, layers folded."""

    modules: tuple[str, ...]
    """Dotted names of the adapted modules."""
    trainable: int
    """Number of parameters that train."""
    total: int
    """Number of parameters, the adapter's included."""

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        head = (
            f"{len(self.modules)} modules, {self.trainable:,} trainable "
            f"of {self.total:,} ({share:.4f}%)"
        )
        return "\n".join([head, *(f"  {line}" for line in fold_names(self.modules))])


@dataclass
class Injection:
    """What a model remembers of its injection, so that it can be named and undone."""

    config: LoRAConfig
    required_grad: dict[str, bool]
    """Which of the base's parameters trained before, by their names then."""


def inject(model: nn.Module, config: LoRAConfig) -> InjectReport:
    """Freeze the model and wrap every target into a LoRALinear, in place.

    Only `lora_A` and `lora_B` train afterwards. Nothing is changed when an error is raised.

    Args:
        model: any module; not yet wrapped by torch.compile or DistributedDataParallel.
        config: what to adapt.

    Returns:
        The modules and the parameter counts.

    Raises:
        LoRAError: the model carries an adapter already, or the configuration does not fit it: a
            target that matches nothing or is no linear layer, a rank above a layer's smaller side.
    """
    if plain_model(model) is not model:
        raise LoRAError("inject before torch.compile or DistributedDataParallel, not after")
    if config_of(model) is not None:
        raise LoRAError("the model carries an adapter already: minilora.unwrap(model) first")
    found = select(model, config)
    for name, module in found.items():
        bases.adapter_placement(module)  # raises if its weight cannot be adapted
        rank, side = config.rank_of(name), min(bases.shape(module))
        if rank > side:
            raise LoRAError(f"rank {rank} is above the smaller side of {name}, {side}")
    return wrap(model, found, config, {name: config.rank_of(name) for name in found})


def wrap(
    model: nn.Module, found: dict[str, nn.Module], config: LoRAConfig, ranks: dict[str, int]
) -> InjectReport:
    """Freeze, then replace each of the found modules by a LoRALinear around it."""
    required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = {
        id(module): LoRALinear(
            module,
            ranks[name],
            config.alpha_of(name),
            config.dropout,
            rslora=config.rslora,
            init=config.init,
        )
        for name, module in found.items()
    }
    model.requires_grad_(False)
    _replace(model, layers)
    model._minilora = Injection(config, required_grad)  # type: ignore[assignment]
    return report(model)


def report(model: nn.Module) -> InjectReport:
    """Count the modules and parameters of an injected model."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return InjectReport(tuple(lora_layers(model)), trainable, sum(p.numel() for p in parameters))


def unwrap(model: nn.Module) -> nn.Module:
    """Merge the adapter for good and put the original modules back under their original names.

    Returns:
        The same model, with the module types, state-dict keys and trainability it had before.

    Raises:
        LoRAError: a weight cannot be merged; the model is left as it was.
    """
    model = plain_model(model)
    layers = lora_layers(model)
    merge_all(layers)
    remove(model)
    return model


def remove(model: nn.Module) -> None:
    """Put the original modules back as they are, merged or not, and forget the adapter."""
    injection = _injection(model)
    _replace(model, {id(layer): layer.base for layer in lora_layers(model).values()})
    if injection is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(injection.required_grad.get(name, True))
        del model._minilora


def merge_all(layers: dict[str, LoRALinear]) -> None:
    """Merge every layer, or none: on an error those that were merged are put back."""
    done: list[LoRALinear] = []
    for name, layer in layers.items():
        if layer.merged:
            continue
        try:
            layer.merge()
        except LoRAError as error:
            for merged in done:
                merged.unmerge()
            raise LoRAError(f"{name}: {error}") from None
        done.append(layer)


def config_of(model: nn.Module) -> LoRAConfig | None:
    """The LoRAConfig the model carries, or None."""
    injection = _injection(plain_model(model))
    return injection.config if injection is not None else None


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters to hand to an optimizer: those that require a gradient."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by dotted name, in the model's order."""
    named = plain_model(model).named_modules()
    return {name: module for name, module in named if isinstance(module, LoRALinear)}


def plain_model(model: nn.Module) -> nn.Module:
    """The model itself, without what torch.compile or DistributedDataParallel put around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def fold_names(names: tuple[str, ...]) -> list[str]:
    """Names that differ in numbers only become one line.

    Example:
        >>> fold_names(("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"))
        ['layers.{0,1}.q_proj', 'layers.0.v_proj']
    """
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "{}", name), []).append(tuple(re.findall(r"\d+", name)))
    lines = []
    for pattern, numbers in groups.items():
        columns = [sorted(set(column), key=int) for column in zip(*numbers, strict=True)]
        lines.append(pattern.format(*map(_fold_numbers, columns)))
    return lines


def _fold_numbers(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    first, last = int(numbers[0]), int(numbers[-1])
    whole = len(numbers) > 2 and last - first == len(numbers) - 1
    return f"{{{first}-{last}}}" if whole else f"{{{','.join(numbers)}}}"


def remember(model: nn.Module, config: LoRAConfig) -> None:
    """Note another configuration on a model that carries an adapter."""
    injection = _injection(model)
    assert injection is not None
    injection.config = config


def _injection(model: nn.Module) -> Injection | None:
    injection = getattr(model, "_minilora", None)
    return injection if isinstance(injection, Injection) else None


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace modules under every name they have; `replacements` goes by id of the old one."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements and not isinstance(parent, LoRALinear):
                setattr(parent, name, replacements[id(child)])
