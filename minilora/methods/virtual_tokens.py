"""What prompt and prefix tuning share: virtual tokens before a frozen model's own tokens.

The models are BART, mBART, T5 and Llama. Their parts are found by name; transformers is not
imported.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minilora.config import LoRAConfig, LoRAError
from minilora.inject import Extra
from minilora.modules import named_modules

MODELS = ("bart", "mbart", "t5", "llama")
"""Values of `model.config.model_type`. Other models differ in names or in positions."""
ENCODER_DECODER, DECODER = "SEQ_2_SEQ_LM", "CAUSAL_LM"
"""PEFT's task types, which choose its wrapper."""


def stacks(model: nn.Module, what: str) -> dict[str, Any]:
    """The model's "encoder" and "decoder"; a Llama has a "decoder" only.

    Raises:
        LoRAError: the model is of another kind.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    found: dict[str, Any] = {}
    for name, module in [("", model), *named_modules(model)]:
        if hasattr(module, "embed_tokens"):
            found.setdefault("encoder" if name.endswith("encoder") else "decoder", module)
    if kind not in MODELS or len(found) < (1 if kind == "llama" else 2):
        raise LoRAError(f"{what} needs a BART, mBART, T5 or Llama, not {type(model).__name__}")
    return found


def task_type(model: nn.Module, what: str) -> str:
    """PEFT's task type for the model."""
    return ENCODER_DECODER if "encoder" in stacks(model, what) else DECODER


class VirtualTokens(Extra):
    """Virtual tokens in a model: the part of an `inject.Extra` that both methods share.

    Args:
        model: not yet changed.
        config: only its field `prompts` is read.

    Attributes:
        config: this method's configuration, or None: then nothing happens.
        enabled: False while swapped: the hooks change nothing.
    """

    folder: ClassVar[str]

    def __init__(self, model: nn.Module, config: LoRAConfig, _: object) -> None:
        found = (c for c in config.prompts if c.folder == self.folder)
        self.config: Any = next(found, None)
        self.enabled = True
        self.hooks: list[RemovableHandle] = []
        self.stacks = stacks(model, self.folder) if self.config is not None else {}

    def swap(self, model: nn.Module) -> None:
        """Switch the virtual tokens off, or on again."""
        self.enabled = not self.enabled

    def stop(self, model: nn.Module) -> None:
        """Take the hooks and the parameters out."""
        for hook in self.hooks:
            hook.remove()
        for stack in self.stacks.values() if self.hooks else ():
            for name in [*stack._parameters, *stack._modules]:
                if name.startswith(self.folder):
                    delattr(stack, name)
        self.hooks = []


def bound(stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call to `stack.forward`, by name."""
    return dict(zip(signature(stack.forward).parameters, args, strict=False)) | dict(kwargs)


def cached(arguments: Mapping[str, Any]) -> int:
    """The number of positions in the cache that a call gets."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def positions(arguments: Mapping[str, Any], x: Tensor, past: int) -> Tensor:
    """The positions (batch or 1, n) of the tokens x (batch, n, ...) among all tokens.

    They are given, or counted from the mask, so that padding on the left shifts no token.
    """
    given, mask, n = arguments.get("position_ids"), arguments.get("attention_mask"), x.shape[1]
    if given is None and mask is not None and mask.ndim == 2:
        given = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
    return torch.arange(past, past + n, device=x.device)[None] if given is None else given
