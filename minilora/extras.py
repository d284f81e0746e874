"""What trains besides A and B: biases and whole modules.

They train in place, under their own names. The base's values are kept, so that `disabled` is the
base and another adapter starts from it. A state_dict holds the trained ones, like any parameter
that trains; the kept ones are part of no checkpoint: they are the base's.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minilora import bases
from minilora.config import LoRAConfig, LoRAError
from minilora.layer import LoRALinear

BASE_BIAS = ".base_layer.bias"
"""How PEFT ends the name of an adapted module's own bias."""


@dataclass
class Kept:
    """The base's values of the tensors that train in place."""

    live: dict[str, str]
    """Name on disk (without PEFT's prefix) -> name in the model's state_dict."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Name in the state_dict -> the base's values; while exchanged, the trained ones."""
    exchanged: bool = False

    def exchange(self, model: nn.Module) -> None:
        """Put the base's values in place of the trained ones, or back; no bytes are copied."""
        state = tensors(model) if self.values else {}
        for name, value in self.values.items():
            tensor = state[name]
            self.values[name] = tensor.data
            tensor.data = value.to(tensor)  # the model may have moved since
        if state:
            torch.clear_autocast_cache()  # it remembers casts by the tensor, not what is in it
        self.exchanged = not self.exchanged


def keep(model: nn.Module, config: LoRAConfig) -> Kept:
    """Let the tensors that the configuration names train, and keep their values before that."""
    kept = Kept(find(model, config, _wrapped(model)))
    state = tensors(model) if kept.live else {}
    seen: set[int] = set()
    for name in kept.live.values():
        tensor = state[name]
        if id(tensor) not in seen:  # a tied bias has two names and one value
            seen.add(id(tensor))
            kept.values[name] = tensor.detach().clone()
            tensor.requires_grad_(isinstance(tensor, nn.Parameter) and tensor.is_floating_point())
    return kept


def find(model: nn.Module, config: LoRAConfig, adapted: Collection[str]) -> dict[str, str]:
    """The tensors that train besides A and B: {name on disk: name in the model's state_dict}.

    Args:
        model: as it is before injection, or injected with whatever configuration.
        config: its `bias` and `also_train` are what counts.
        adapted: the modules that this configuration adapts.
    """
    if config.bias == "none" and not config.also_train:
        return {}
    wrapped = _wrapped(model)
    found = {}
    for key in tensors(model):
        module, _, end = key.rpartition(".")
        if module in wrapped:
            continue  # the adapter's own
        if module.removesuffix(".base") in wrapped:
            module = module.removesuffix(".base")
        if end == "bias" and module in adapted:
            if config.bias != "none":
                found[module + BASE_BIAS] = key
        elif (end == "bias" and config.bias == "all") or trained_module(config, module):
            found[f"{module}.{end}" if module else end] = key
    return found


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict with the parameters themselves, by names without wrappers' parts."""
    return {bases.plain_name(k): t for k, t in model.state_dict(keep_vars=True).items()}


def trained_module(config: LoRAConfig, module: str) -> str | None:
    """The module of `also_train` that this one is or lies in (PEFT's rule: the name's end)."""
    parts = module.split(".") if config.also_train else []
    for name in (".".join(parts[: i + 1]) for i in range(len(parts))):
        if name.endswith(config.also_train):
            return name
    return None


def check_untied(model: nn.Module, config: LoRAConfig) -> None:
    """Refuse to train a module that shares a parameter with another module.

    Raises:
        LoRAError: names both.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(bases.plain_name(name))
    for names in owners.values():
        roots = {trained_module(config, name.rpartition(".")[0]): name for name in names}
        if len(roots) > 1:
            first, *others = roots.values()
            raise LoRAError(
                f"also_train: {first} is the same parameter as {', '.join(others)}: training one "
                "alone would change the other; adapt linears instead, or untie the weights first"
            )


def check_dense(model: nn.Module, config: LoRAConfig) -> None:
    """Refuse to train a module with a weight in four bits: only its bias would train.

    Raises:
        LoRAError: names it.
    """
    for name, module in model.named_modules():
        name = bases.plain_name(name)
        if not bases.is_mergeable(module) and trained_module(config, name):
            raise LoRAError(
                f"also_train: {name} is a {type(module).__name__}, whose weight cannot train: "
                "leave it out of minilora.quantize, by exclude"
            )


def _wrapped(model: nn.Module) -> set[str]:
    named = model.named_modules()
    return {bases.plain_name(name) for name, module in named if isinstance(module, LoRALinear)}
