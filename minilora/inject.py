"""Inject: wrap the targets and freeze the rest. Unwrap: the plain model again, merged."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from minilora import bases, extras
from minilora.biased import BiasedLoRALinear
from minilora.config import LoRAConfig, LoRAError
from minilora.dora import DoRALinear
from minilora.layer import LoRALinear, refuse_when_merged
from minilora.quantize import check_linear, count_weights, dequantize_model, replace_modules
from minilora.targets import select


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did. Printed: one line of counts, then the modules, layers folded.

    Attributes:
        modules: dotted names of the adapted modules.
        trainable: number of parameters that train.
        total: number of parameters, the adapter's included.
        also: names of the biases and whole modules' parameters that train too.

    Example:
        >>> print(InjectReport(("layers.0.fc", "layers.1.fc"), trainable=5, total=200))
        2 modules, 5 trainable of 200 (2.5000%)
          layers.{0,1}.fc
    """

    modules: tuple[str, ...]
    trainable: int
    total: int
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        head = (
            f"{len(self.modules)} modules, {self.trainable:,} trainable "
            f"of {self.total:,} ({share:.4f}%)"
        )
        lines = fold_names(self.modules) + [f"and {name}" for name in fold_names(self.also)]
        return "\n".join([head, *(f"  {line}" for line in lines)])


@dataclass
class Injection:
    """What a model remembers of its injection, so that it can be named and undone."""

    config: LoRAConfig
    required_grad: dict[str, bool]
    """Which of the base's parameters trained before, by their names then."""
    kept: extras.Kept
    """What trains besides A and B, and the base's values of it."""
    hook: RemovableHandle
    """Refuses to load weights while merged, before the first of them is written."""


def inject(model: nn.Module, config: LoRAConfig) -> InjectReport:
    """Freeze the model and wrap every target into a LoRALinear, in place.

    Only the adapter trains afterwards: `lora_A`, `lora_B` and what the configuration adds to them.
    Nothing is changed when an error is raised. Freezing all but A and B is Hu et al. 2021, section
    4.1 (https://arxiv.org/abs/2106.09685).

    Args:
        model: any module; not yet wrapped by torch.compile or DistributedDataParallel.
        config: what to adapt.

    Returns:
        The modules and the parameter counts.

    Example:
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "fc": nn.Linear(8, 8)})
        >>> report = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> report.modules, report.trainable, report.total
        (('q_proj',), 32, 176)

    Raises:
        LoRAError: the model carries an adapter already, or the configuration does not fit it: a
            target that matches nothing or is no linear layer, a rank above a layer's smaller side.
    """
    if plain_model(model) is not model:
        raise LoRAError("inject before torch.compile or DistributedDataParallel, not after")
    if config_of(model) is not None or lora_layers(model):
        raise LoRAError("the model carries an adapter already: minilora.unwrap(model) first")
    found = select(model, config)
    extras.check_untied(model, config)
    extras.check_dense(model, config)
    for name, module in found.items():
        rank, side = config.rank_of(name), min(bases.shape(module))
        if rank > side:
            raise LoRAError(f"rank {rank} is above the smaller side of {name}, {side}")
        if config.init == "loftq":
            check_linear(name, module)
    return wrap(model, found, config, {name: config.rank_of(name) for name in found})


def wrap(
    model: nn.Module, found: dict[str, nn.Module], config: LoRAConfig, ranks: dict[str, int]
) -> InjectReport:
    """Freeze, then replace each of the found modules by a LoRALinear around it."""
    required_grad = {bases.plain_name(n): p.requires_grad for n, p in model.named_parameters()}
    kind = layer_type(config)
    layers = {
        module: kind(
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
    model.zero_grad()  # a frozen weight with a gradient would still be decayed by an optimizer
    replace_modules(model, layers)
    kept = extras.keep(model, config)
    hook = model.register_load_state_dict_pre_hook(_refuse_when_merged)
    model._minilora = Injection(config, required_grad, kept, hook)  # type: ignore[assignment]
    return report(model)


def layer_type(config: LoRAConfig) -> type[LoRALinear]:
    """The class of the layers that this configuration asks for."""
    return DoRALinear if config.dora else BiasedLoRALinear if config.lora_bias else LoRALinear


def report(model: nn.Module) -> InjectReport:
    """Count the modules and parameters of an injected model."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters) + count_weights(model)
    injection = injection_of(model)
    also = tuple(injection.kept.live) if injection is not None else ()
    return InjectReport(tuple(lora_layers(model)), trainable, total, also)


def unwrap(
    model: nn.Module, dequantize: bool = False, dtype: torch.dtype | None = None
) -> nn.Module:
    """Merge the adapter for good and put the original modules back under their original names.

    Afterwards inference costs what the base costs: the modules are the very same ones (Hu et al.
    2021, section 4.1, "no additional inference latency").

    Args:
        model: as `inject` or `load_adapter` left it, merged or not.
        dequantize: turn a 4-bit base into plain linears, W + s B A with the W that its codes mean,
            and print what rounding that cost.
        dtype: float32 or bfloat16, to which the sum is rounded once and the rest of the model cast;
            by default each layer's own, the model's. Only with `dequantize`.

    Returns:
        The same model, with the module types, state-dict keys and trainability it had before.

    Raises:
        LoRAError: a weight cannot be merged; the model is left as it was.

    Example:
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> list(unwrap(model).state_dict())
        ['q_proj.weight', 'q_proj.bias']
    """
    model = plain_model(model)
    layers = lora_layers(model)
    if dequantize:
        merged = [layer for layer in layers.values() if layer.merged]

        def take_back() -> None:
            for layer in layers.values():
                if layer not in merged:
                    layer.unmerge()

        print(dequantize_model(model, dtype, lambda: merge_all(layers), take_back))
    merge_all(layers)
    remove(model)
    return model


def remove(model: nn.Module, restore: bool = False) -> None:
    """Put the original modules back as they are, merged or not, and forget the adapter.

    Args:
        model: as `inject` left it.
        restore: give biases and modules that trained in place the base's values again.
    """
    injection = injection_of(model)
    if injection is not None and restore:
        injection.kept.exchange(model)
    replace_modules(model, {layer: layer.base for layer in lora_layers(model).values()})
    if injection is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(injection.required_grad.get(bases.plain_name(name), True))
        injection.hook.remove()
        del model._minilora


def merge_all(layers: dict[str, LoRALinear]) -> None:
    """Merge every layer, or none: on an error those that were not merged before are put back."""
    unmerged = {name: layer for name, layer in layers.items() if not layer.merged}
    for name, layer in unmerged.items():
        try:
            layer.merge()
        except BaseException as error:  # too little memory for the kept weights, for one
            for merged in unmerged.values():
                merged.unmerge()
            if isinstance(error, LoRAError):
                raise LoRAError(f"{name}: {error}") from None
            raise


def config_of(model: nn.Module) -> LoRAConfig | None:
    """The LoRAConfig the model carries, or None.

    Args:
        model: any module, wrapped by torch.compile or DistributedDataParallel or not.

    Example:
        >>> config_of(nn.Linear(8, 8)) is None
        True
    """
    injection = injection_of(plain_model(model))
    return injection.config if injection is not None else None


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters to hand to an optimizer: those that require a gradient.

    Args:
        model: any module.

    Example:
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(16, 4)})
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> [tuple(parameter.shape) for parameter in trainable_parameters(model)]
        [(2, 16), (4, 2)]
    """
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by dotted name, in the model's order."""
    named = plain_model(model).named_modules()
    return {bases.plain_name(name): m for name, m in named if isinstance(m, LoRALinear)}


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
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}  # what is between the numbers
    for name in names:
        groups.setdefault(tuple(re.split(r"\d+", name)), []).append(tuple(re.findall(r"\d+", name)))
    lines = []
    for texts, numbers in groups.items():
        columns = [sorted(set(column), key=int) for column in zip(*numbers, strict=True)]
        if math.prod(map(len, columns)) == len(numbers):  # every combination is there
            numbers = [tuple(map(_fold_numbers, columns))]
        for row in numbers:
            pairs = zip(texts, (*row, ""), strict=True)
            lines.append("".join(text + number for text, number in pairs))
    return lines


def _fold_numbers(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    first, last = int(numbers[0]), int(numbers[-1])
    whole = len(numbers) > 2 and last - first == len(numbers) - 1
    return f"{{{first}-{last}}}" if whole else f"{{{','.join(numbers)}}}"


def injection_of(model: nn.Module) -> Injection | None:
    """What the model remembers of its injection, or None."""
    injection = getattr(model, "_minilora", None)
    return injection if isinstance(injection, Injection) else None


def _refuse_when_merged(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object
) -> None:
    for name, layer in lora_layers(model).items():
        refuse_when_merged(layer, state_dict, f"{prefix}{name}.")
