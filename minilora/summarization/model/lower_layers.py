"""The layers of an encoder below the lowest one that trains: their states are kept too.

    H = layers[:k](x)                    (s, d), the same in every epoch
    encoder(x) = the rest of the encoder, layers[k:] first, of H

The model's own forward computes the rest: a module that returns H takes the place of the layers
below.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UserError


class Given(nn.Module):
    """In the place of the lower layers: returns their states, whatever it is called with."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states  # (b, s, d)

    def forward(self, *_: object, **__: object) -> Tensor:
        return self.states


def layer_list(model: PreTrainedModel) -> tuple[nn.Module, str] | None:
    """The module that has the encoder's layers as a list, and the list's name in it."""
    for module in model.get_encoder().modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and isinstance(
                next(iter(child), None), GradientCheckpointingLayer
            ):
                return module, name
    return None


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The encoder's layers, from the bottom; empty if they are not found."""
    found = layer_list(model)
    return list(getattr(*found)) if found else ()


@contextmanager
def only(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block the encoder has these layers."""
    found = layer_list(model)
    assert found is not None
    before = getattr(*found)
    setattr(*found, nn.ModuleList(layers))
    try:
        yield
    finally:
        setattr(*found, before)


def lower_states(model: PreTrainedModel, k: int, **inputs: Tensor) -> Tensor:
    """H (b, s, d): the output of layer k - 1.

    Raises:
        UserError: the layer returns more than its states.
    """
    outputs = list[object]()
    lower = layers_of(model)[:k]
    hook = lower[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        with only(model, lower):
            model.get_encoder()(**inputs)
    finally:
        hook.remove()
    if not isinstance(outputs[0], Tensor):
        kind = model.config.model_type
        raise UserError(f"the layers of {kind}'s encoder return more than their states")
    return outputs[0]


def from_states(model: PreTrainedModel, k: int, states: Tensor, **inputs: Tensor) -> Tensor:
    """encoder(x) (b, s, d) of H (b, s, d), with a graph if layers[k:] train."""
    with only(model, [Given(states), *layers_of(model)[k:]]):
        output: Tensor = model.get_encoder()(**inputs).last_hidden_state
    return output
