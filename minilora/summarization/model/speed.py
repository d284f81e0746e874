"""Cheaper training steps with the same results."""

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

from ..errors import UserError
from .attention import attention


def hold_frozen_linears(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep the weights of frozen linears in autocast's dtype: else each call casts them again.

    The outputs under autocast are the same, bit for bit. Embeddings and LayerNorm stay in float32,
    and so do the linears under DoRA, which takes the norm of the exact weight. A head that is tied
    to an embedding gets its own copy.

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
    """Copy the tensors that are views of the file that the model was read from.

    One such tensor keeps the whole file in memory, and a write to the file changes the model.
    """
    for parameter in model.parameters():
        if parameter.is_cpu:
            parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.clone())  # a view, so changing its data is not enough


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Save only the inputs of layers, and compute the rest again in the backward pass.

    Raises:
        UserError: the model does not support it.
    """
    if not model.supports_gradient_checkpointing:
        what = f"not supported by {model.config.model_type}: leave the flag out"
        raise UserError(f"--checkpoint-activations: {what}")
    # Reentrant checkpoints cut the graph where no input requires a gradient: behind frozen
    # embeddings the adapters would not train.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # For reentrant checkpoints transformers makes the embeddings' outputs require a gradient. With
    # this, layers below the lowest adapter would be recomputed and run backward for nothing.
    model.disable_input_require_grads()


def compile_layers(model: nn.Module) -> None:
    """`torch.compile` each layer in place, for any length: equal layers share the compiled code.

    The names of the model's modules stay as they are.

    Raises:
        UserError: the model has no layers of the kind that transformers repeats.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        kind = type(model).__name__
        raise UserError(f"--compile: found no layers to compile in a {kind}: leave the flag out")
    for layer in layers:
        layer.compile(dynamic=True)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside the block compiled layers run eagerly: decoding would compile for each length."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


class CheapStep(TorchFunctionMode):
    """Inside `with CheapStep():` a step on a CPU takes less time and memory.

    F.dropout spends most of its time in `bernoulli_` on a CPU, and keeps four bytes per element;
    here it draws masks faster and keeps one byte. Attention is `attention.attention`. Not for
    activation checkpoints, which recompute outside the block.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout:
            func = self.dropout
        elif func is F.scaled_dot_product_attention:
            func = attention
        return func(*args, **(kwargs or {}))

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
