"""Biases and whole modules that train in addition to A and B: an `inject.Extra`.

They train in place, under their own names. The base's values are kept, for `disabled` and for the
next adapter. A state_dict holds the trained values, as for any parameter; no checkpoint holds the
kept ones, since the base has them.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from minilora import linears
from minilora.config import LoRAConfig, LoRAError
from minilora.inject import Extra, lora_layers
from minilora.modules import named_modules, owners, plain_name
from minilora.targets import trained_whole

BASE_BIAS = ".base_layer.bias"
"""The end of PEFT's name for the bias of an adapted module's base."""


class TrainedWhole(Extra):
    """The biases and whole modules that one configuration trains: an `inject.Extra`.

    Args:
        model: not yet changed.
        config: its `bias` and `also_train` are read.
        adapted: names of the modules that this configuration adapts.

    Attributes:
        values: name on disk -> the base's values; while swapped, the trained values.

    Raises:
        LoRAError: a module of `also_train` shares a weight with another, or is in four bits.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, adapted: Collection[str]) -> None:
        for holders in owners(model).values() if config.also_train else ():
            roots = {trained_whole(config, name): name for name in holders}
            if len(roots) > 1:
                first, *rest = roots.values()
                shared = f"also_train: {first} shares its weight with {', '.join(rest)}"
                raise LoRAError(f"{shared}: training one would change both; untie them first")
        for name, module in named_modules(model):
            if not linears.is_mergeable(module) and trained_whole(config, name):
                what = f"also_train: {name} is a {type(module).__name__}, whose weight cannot train"
                raise LoRAError(f"{what}: leave it out of minilora.quantize, by exclude")
        self.config, self.adapted = config, frozenset(adapted)
        self.values: dict[str, Tensor] = {}

    def names(self, model: nn.Module) -> dict[str, str]:
        """Name on disk -> name in the state_dict, for all that trains; injected or not."""
        bias, layers, found = self.config.bias, lora_layers(model), {}
        for key in tensors(model) if bias != "none" or self.config.also_train else ():
            parent, _, end = key.rpartition(".")
            if (module := base_name(parent, layers)) is None:
                continue  # a tensor of the adapter
            if end == "bias" and module in self.adapted:
                if bias != "none":
                    found[module + BASE_BIAS] = key
            elif (end == "bias" and bias == "all") or trained_whole(self.config, module):
                found[f"{module}.{end}" if module else end] = key
        return found

    def find(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors that train, by name on disk."""
        names = self.names(model)
        state = tensors(model) if names else {}
        return {name: state[key] for name, key in names.items() if key in state}

    def start(self, model: nn.Module) -> None:
        """Let the tensors train, and keep the base's values."""
        # A tied bias has two names and one value.
        for name, tensor in {id(t): (name, t) for name, t in self.find(model).items()}.values():
            self.values[name] = tensor.detach().clone()
            require_grad(tensor)

    def swap(self, model: nn.Module) -> None:
        """Exchange the trained values and the base's; no bytes are copied."""
        state = self.find(model)
        for name, value in self.values.items():
            tensor = state[name]
            self.values[name] = tensor.data
            tensor.data = value.to(tensor)  # the model may have moved since
        if state:
            torch.clear_autocast_cache()  # its key is the tensor: a changed value would go unseen


class Embeddings(TrainedWhole):
    """Embeddings in a file of PEFT whose configuration does not name them. They stay frozen.

    PEFT adds them if they were resized, and the base's weight of an adapted output head. They are
    loaded into the weight itself. If it is tied, this changes all modules that share it.

    Args:
        keys: names of the tensors on disk, such as "lm_head.weight" or "lm_head.base_layer.weight".
    """

    def __init__(self, keys: Collection[str]) -> None:
        self.keys, self.values = tuple(keys), {}

    def names(self, model: nn.Module) -> dict[str, str]:
        """Each name without PEFT's part for the base; with minilora's, if the model has it."""
        layers, found = lora_layers(model), {}
        for key in self.keys:
            module, _, end = key.replace(".base_layer", "").rpartition(".")
            found[key] = f"{module}.base.{end}" if module in layers else f"{module}.{end}"
        return found


def require_grad(tensor: Tensor, trains: bool = True) -> None:
    """Set `requires_grad`, but never on buffers and integers, which cannot train."""
    can = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    tensor.requires_grad_(trains and can)


def base_name(module: str, layers: Collection[str]) -> str | None:
    """The name that a module has in the plain model; None for an adapted layer itself."""
    parent, _, last = module.rpartition(".")
    if module in layers:
        return None
    return parent if last == "base" and parent in layers else module


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with the parameters themselves, and with no wrapper's prefix in the names."""
    return {plain_name(k): t for k, t in model.state_dict(keep_vars=True).items()}
