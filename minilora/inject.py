"""Inject: wrap the targets and freeze the rest. Unwrap and unload: the plain model again."""

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minilora import conventions, linears
from minilora.config import LoRAConfig, LoRAError
from minilora.layer import LoRALinear, refuse_merged
from minilora.modules import naming, plain_model, plain_name, replace_modules, require_grad, seeded
from minilora.reports import InjectReport
from minilora.targets import select


def inject(model: nn.Module, config: LoRAConfig, seed: int | None = None) -> InjectReport:
    """Freeze the model and wrap every target into a LoRALinear, in place.

    Only the adapter trains afterwards: `lora_A`, `lora_B` and what the configuration adds to them.
    Afterwards `config_of` returns the configuration with the model's names instead of "attention",
    and with the head that its `task_type` adds. An error leaves the model unchanged. Freezing all
    but A and B: Hu et al. 2021, section 4.1 (https://arxiv.org/abs/2106.09685). `minilora.inject`
    takes more: see `methods/together.py`.

    Args:
        model: any module; not yet wrapped by torch.compile or DistributedDataParallel.
        config: what to adapt.
        seed: of the random start; the report records it, and torch's global random state does not
            change. Without a seed the start is drawn from that state.

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
    config = conventions.completed(model, config)
    selected = select(model, config)
    for name, module in selected.items():
        if (rank := config.rank_of(name)) > (side := min(linears.shape(module))):
            raise LoRAError(f"rank {rank} is above the smaller side of {name!r}, {side}: lower it")
    with seeded(model, seed):
        wrap(model, selected, config)
    return report(model, seed)


def wrap(model: nn.Module, selected: dict[str, nn.Module], config: LoRAConfig) -> None:
    """Freeze, then replace each of the selected modules by a LoRALinear around it."""
    required_grad = {plain_name(n): p.requires_grad for n, p in model.named_parameters()}
    extras = [extra(model, config, selected) for extra in EXTRAS]
    layer_class, layers = layer_for(config), {}
    more: Any = {"dropout": config.dropout, "rslora": config.rslora, "init": config.init}
    hook = model.register_load_state_dict_pre_hook(refuse_merged)
    model._minilora = Injection(config, required_grad, extras, hook)  # type: ignore[assignment]
    try:
        for name, module in selected.items():
            rank, alpha = config.rank_of(name), config.alpha_of(name)
            with naming(name):
                layers[module] = layer_class(module, rank, alpha, **more)
        model.requires_grad_(False)
        replace_modules(model, layers)
        for extra in extras:
            extra.start(model)
    except BaseException:  # Ctrl-C too: the model is left as it was
        replace_modules(model, {layer: module for module, layer in layers.items()})
        _put_back(model)
        raise
    model.zero_grad()  # an optimizer skips a parameter only if its gradient is None


def layer_for(config: LoRAConfig) -> type[LoRALinear]:
    """The class of the layers that this configuration asks for."""
    asked = (layer for key, layer in LAYERS.items() if getattr(config, key, config.init == key))
    return next(asked, LoRALinear)


def report(model: nn.Module, seed: int | None = None) -> InjectReport:
    """Count the modules and parameters of an injected model."""
    parameters, injection = list(model.parameters()), injection_of(model)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    quantized = [m for m in model.modules() if not linears.is_mergeable(m)]  # not in parameters
    total = sum(p.numel() for p in parameters) + sum(math.prod(linears.shape(m)) for m in quantized)
    also = [n for extra in (injection.extras if injection else ()) for n in extra.find(model)]
    return InjectReport(tuple(lora_layers(model)), trainable, total, tuple(also), seed)


def unwrap(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Merge the adapter for good and put the original modules back under their original names.

    Afterwards inference costs what the base costs: the modules are the base's own objects (Hu
    et al. 2021, section 4.1, "no additional inference latency").

    Args:
        model: as `inject` or `load_adapter` left it, merged or not.
        dequantize: turn a 4-bit base into plain linears, W + s B A with W decoded from its codes,
            rounded once to the model's dtype (`model.float()` before it: not rounded). What that
            cost is logged, by `logging.getLogger("minilora")`.

    Returns:
        The same model, with the module types, state-dict keys and trainability it had before. One
        without an adapter is returned as it is.

    Raises:
        LoRAError: a weight, or a prompt or prefix, cannot be merged; the model is left as it was.

    Example:
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",)))
        >>> list(unwrap(model).state_dict())
        ['q_proj.weight', 'q_proj.bias']
    """
    conventions.refuse_part(model)
    if kept := unmergeable(model):
        raise LoRAError(f"a {kept} cannot be merged: minilora.merge keeps it, unload takes it out")
    for extra in getattr(injection_of(model), "extras", ()):
        extra.check()
    with ExitStack() as stack:
        for dequantized in DEQUANTIZERS if dequantize else ():
            stack.enter_context(dequantized(model))
        merge_layers(lora_layers(model))
    return _put_back(model)


def unload(model: nn.Module) -> nn.Module:
    """Put the original modules back without the adapter: the base model, bit for bit.

    After `init="loftq"` that is the quantized base.

    Args:
        model: as `inject` or `load_adapter` left it, merged or not.

    Returns:
        The same model, with the modules, values and trainability it had before. One without an
        adapter is returned as it is.

    Raises:
        LoRAError: the model is in a `disabled` block, which merges again at its end.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        >>> before = model["q_proj"].weight.clone()
        >>> _ = inject(model, LoRAConfig(rank=2, targets=("q_proj",), init="random"))
        >>> torch.equal(unload(model)["q_proj"].weight, before)
        True
    """
    if not getattr(injection_of(model), "enabled", True):
        raise LoRAError("cannot unload inside `with minilora.disabled(model)`: unload after it")
    enable_extras(model, False)
    for layer in lora_layers(model).values():
        layer.unmerge()
    return _put_back(model)


def _put_back(model: nn.Module) -> nn.Module:
    """Put the original modules back as they are, merged or not; drop the adapter's record."""
    model = plain_model(model)
    replace_modules(model, {layer: layer.base for layer in lora_layers(model).values()})
    if (injection := injection_of(model)) is not None:
        for extra in injection.extras:
            extra.stop(model)
        require_grad(model, injection.required_grad)
        injection.hook.remove()
        del model._minilora
    return model


def merge_layers(layers: dict[str, LoRALinear], measure: Any = lambda *_: None) -> list[Any]:
    """Merge every layer, or none: on an error those that were not merged before are put back.

    Returns what `measure(name, layer)` says of each merged layer; an error in it counts too.
    """
    unmerged = {name: layer for name, layer in layers.items() if not layer.merged}
    try:
        for name, layer in unmerged.items():
            with naming(name):
                layer.merge()
        return [measure(name, layer) for name, layer in layers.items()]
    except BaseException:  # also when there is no memory for the original weights
        for layer in unmerged.values():
            layer.unmerge()
        raise


def config_of(model: nn.Module) -> LoRAConfig | None:
    """The LoRAConfig the model carries, with its field `prompts`, or None.

    Args:
        model: any module, wrapped by torch.compile or DistributedDataParallel or not.

    Example:
        >>> config_of(nn.Linear(8, 8)) is None
        True
    """
    return getattr(injection_of(model), "config", None)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by dotted name, in the model's order."""
    named = plain_model(model).named_modules()
    return {plain_name(name): m for name, m in named if isinstance(m, LoRALinear)}


# What a model remembers, and what methods other than plain LoRA add ------------------------------


class Extra:
    """Base class for what trains outside the adapted layers, such as biases.

    One is made for every injection, by (model, configuration, names of the adapted modules). The
    constructor raises on wrong input and leaves the model as it is. If there is nothing to train,
    `find` returns {} and the others do nothing.
    """

    def find(self, model: nn.Module) -> dict[str, Tensor]:
        """Name on disk, without PEFT's prefix -> tensor that trains; before `start` one like it."""
        return {}

    def start(self, model: nn.Module) -> None:
        """Make it require a gradient, and keep the base's values."""

    def swap(self, model: nn.Module) -> None:
        """Put the base's values in the place of the trained ones, or back."""

    def check(self) -> None:
        """Raise a LoRAError if `stop` cannot write the current values; `unwrap` calls it first."""

    def stop(self, model: nn.Module) -> None:
        """Remove what `start` added to the model; the current values stay."""


@dataclass
class Injection:
    """State stored on the model at injection; used to undo it."""

    config: LoRAConfig
    required_grad: dict[str, bool]
    """Which of the base's parameters trained before, by their names then."""
    extras: list[Extra]
    hook: RemovableHandle
    enabled: bool = True
    """False inside `with disabled(model)`."""


def injection_of(model: nn.Module) -> Injection | None:
    """The record of the model's injection, or None."""
    return getattr(plain_model(model), "_minilora", None)


def enable_extras(model: nn.Module, enabled: bool) -> bool:
    """Switch the extras to their trained values or to the base's; returns the previous state.

    Raises:
        LoRAError: a part of the model has them, not the model.
    """
    conventions.refuse_part(model)
    if (injection := injection_of(model)) is None or injection.enabled == enabled:
        return enabled
    for extra in injection.extras:
        extra.swap(plain_model(model))
    injection.enabled = enabled
    return not enabled


def unmergeable(model: nn.Module) -> str:
    """What cannot be merged: "prompt", "prefix", "prompt and prefix", or "" for neither."""
    return " and ".join(c.folder for c in getattr(config_of(model), "prompts", ()))


# For plain LoRA these tables are empty; `minilora/methods/__init__.py` fills them and says how.
LAYERS: dict[str, type[LoRALinear]] = {}
"""A flag of the configuration, or a value of `init` -> the class of layer that it selects."""
EXTRAS: list[Callable[[nn.Module, LoRAConfig, Collection[str]], Extra]] = []
"""Constructors of `Extra`s: (model, configuration, names of the adapted modules) -> Extra."""
DEQUANTIZERS: list[Callable[[nn.Module], AbstractContextManager[None]]] = []
"""Context managers around merging: on entry quantized linears become plain and wide, on exit they
are rounded to the model's dtype."""
