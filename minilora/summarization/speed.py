"""What makes a training step cheaper and leaves what it computes as it is."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from minilora.fused import keep_mask
from minilora.methods.dora import DoRALinear
from minilora.summarization.presets import UserError


def hold_frozen_linears(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep the weights of frozen linears in autocast's dtype, to which each call would round them.

    The outputs under autocast are the same bits. Embeddings and LayerNorm stay in float32, and so
    does what DoRA wraps, whose norm is taken of the whole weight; a head tied to an embedding gets
    a copy of its own.

    Args:
        model: injected already, so that what trains is known.
        dtype: autocast's; None changes nothing.
    """
    if dtype is None:
        return
    whole = {module.base for module in model.modules() if isinstance(module, DoRALinear)}
    for module in model.modules():
        if type(module) is nn.Linear and module not in whole:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    narrow = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                    setattr(module, name, narrow)


def release_file(model: nn.Module) -> None:
    """Copy what is still a view of the file that the model was read from.

    One such tensor keeps all of the file in memory, and whoever writes to the file writes to the
    model.
    """
    for parameter in model.parameters():
        if parameter.is_cpu:
            parameter.data = parameter.data.clone()
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_cpu:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())


def choose_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Eager attention on a CPU where the attention drops out; otherwise what transformers chose.

    With dropout, torch has no fused kernel for the CPU: sdpa holds the probabilities as eager
    attention does, is slower, and draws its dropout by `bernoulli_`.
    """
    if device.type == "cpu" and getattr(model.config, "attention_dropout", False):
        model.set_attn_implementation("eager")


EAGER_POSITIONS = 512
"""Up to so many tokens a step on a CPU takes 0.8 to 0.9 of the time with eager attention that it
takes with sdpa, at 1,000 it takes 1.2 of it; and what eager attention holds, the probabilities,
grows with their square."""


@contextmanager
def cheap_step(model: PreTrainedModel, positions: int) -> Iterator[None]:
    """Inside the block a CPU's step is cheaper: `CheapDropout`, and eager attention where it pays.

    Args:
        model: about to train on batches of which no source or target is longer than `positions`.
        positions: decides, so that a step depends on nothing but its batches.
    """
    before = model.config._attn_implementation
    eager = before == "sdpa" and positions <= EAGER_POSITIONS
    if eager:
        model.set_attn_implementation("eager")
    try:
        with CheapDropout():
            yield
    finally:
        if eager:
            model.set_attn_implementation(before)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Save the inputs of layers only, and compute the rest again in the backward pass.

    Raises:
        UserError: the model knows no such thing.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"--checkpoint-activations: a {model.config.model_type} model cannot")
    # Reentrant checkpoints cut the graph where no input requires a gradient: behind frozen
    # embeddings the adapters would not train.
    model.gradient_checkpointing_enable({"use_reentrant": False})


def compile_layers(model: nn.Module) -> None:
    """`torch.compile` each layer in place, for any length: layers alike share what is compiled.

    Names in the model stay as they are.

    Raises:
        UserError: the model has no layers of the kind that transformers repeats.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"--compile: found no layers to compile in a {type(model).__name__}")
    for layer in layers:
        layer.compile(dynamic=True)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside the block compiled layers run as they are: decoding would compile for each length."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


class CheapDropout(TorchFunctionMode):
    """Inside `with CheapDropout():` the model's F.dropout draws cheaper masks and saves bytes.

    On a CPU F.dropout spends most of its time in `bernoulli_`, and saves four bytes per element.
    Not for activation checkpoints: in the backward pass, which computes layers again, it is off.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self.dropout(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """F.dropout: x m / (1 - p)."""
        if not (training and 0 < p < 1) or inplace:
            return F.dropout(x, p, training, inplace)
        return _Dropout.apply(x, p)  # type: ignore[no-untyped-call, no-any-return]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = keep_mask(x, p)
        ctx.save_for_backward(mask)
        ctx.growth = 1 / (1 - p)
        return (x * mask).mul_(ctx.growth)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (G * mask).mul_(ctx.growth), None
