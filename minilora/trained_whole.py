"""Biases and whole modules that train beside A and B: the `inject.Extra` of this package.

They train in place, under their own names. The base's values are kept, so that `disabled` is the
base and another adapter starts from it. A state_dict holds the trained ones, like any parameter
that trains; the kept ones are in no checkpoint, since they are the base's.
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
"""How PEFT ends the name of an adapted module's own bias."""


class TrainedWhole(Extra):
    """What one configuration lets train beside A and B: `inject.Extra`.

    Args:
        model: not yet changed.
        config: its `bias` and `also_train` count.
        adapted: the modules that this configuration adapts.

    Attributes:
        values: name on disk -> the base's values; while swapped, the trained ones.

    Raises:
        LoRAError: a module of `also_train` shares a weight with another, or is in four bits.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, adapted: Collection[str]) -> None:
        for holders in owners(model).values() if config.also_train else ():
            roots = {trained_whole(config, name): name for name in holders}
            if len(roots) > 1:
                first, *rest = roots.values()
                shared = f"also_train: {first} shares its weight with {', '.join(rest)}"
                raise LoRAError(
                    f"{shared}: training one would change both; untie the weights first"
                )
        for name, module in named_modules(model):
            if not linears.is_mergeable(module) and trained_whole(config, name):
                what = f"also_train: {name} is a {type(module).__name__}, whose weight cannot train"
                raise LoRAError(f"{what}: leave it out of minilora.quantize, by exclude")
        self.config, self.adapted = config, frozenset(adapted)
        self.values: dict[str, Tensor] = {}

    def names(self, model: nn.Module) -> dict[str, str]:
        """What trains, in a model that is injected or not: name on disk -> in the state_dict."""
        bias, layers, found = self.config.bias, lora_layers(model), {}
        for key in tensors(model) if bias != "none" or self.config.also_train else ():
            parent, _, end = key.rpartition(".")
            module = base_name(parent, layers)
            if module is None:
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
        return {name: state[key] for name, key in names.items()}

    def start(self, model: nn.Module) -> None:
        """Let the tensors train, and keep their values before that."""
        # A tied bias has two names and one value.
        for name, tensor in {id(t): (name, t) for name, t in self.find(model).items()}.values():
            self.values[name] = tensor.detach().clone()
            require_grad(tensor)

    def swap(self, model: nn.Module) -> None:
        """Put the base's values in the place of the trained ones, or back; no bytes are copied."""
        state = self.find(model)
        for name, value in self.values.items():
            tensor = state[name]
            self.values[name] = tensor.data
            tensor.data = value.to(tensor)  # the model may have moved since
        if state:
            torch.clear_autocast_cache()  # its key is the tensor, whatever the values


class Embeddings(TrainedWhole):
    """Embeddings that a file of PEFT's holds unnamed, as it writes them once they were resized.

    They are read into the weight itself: where it is tied, under all its names.

    Args:
        names: of the modules, on disk and in the model alike.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.unnamed, self.values = tuple(f"{name}.weight" for name in names), {}

    def names(self, model: nn.Module) -> dict[str, str]:
        """The same in any model."""
        return {name: name for name in self.unnamed}


def require_grad(tensor: Tensor, trains: bool = True) -> None:
    """Buffers and whole numbers cannot train."""
    can = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    tensor.requires_grad_(trains and can)


def base_name(module: str, layers: Collection[str]) -> str | None:
    """The name that a module has in the plain model; None for the adapter's own layers."""
    parent, _, last = module.rpartition(".")
    if module in layers:
        return None
    return parent if last == "base" and parent in layers else module


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict with the parameters themselves, by names without wrappers' parts."""
    return {plain_name(k): t for k, t in model.state_dict(keep_vars=True).items()}
