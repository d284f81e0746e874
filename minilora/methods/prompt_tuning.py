"""Prompt tuning: trained vectors precede the input embeddings of a frozen model.

Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning
(https://arxiv.org/abs/2104.08691), section 2: the embedded input X (n, d) becomes

    [P; X]    (m + n, d)    with P (m, d), the only parameters

in front of the encoder, or of the decoder in a Llama. P starts from the embeddings of words
(section 3.2). In an encoder-decoder, cross-attention reads the prompt too, since it is part of the
encoder's output. A Llama returns logits for its own n tokens only, so labels need no padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.config import LoRAError, check
from minilora.methods.virtual_tokens import VirtualTokens, bound, cached, positions


@dataclass(frozen=True)
class PromptConfig:
    """Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691); see `inject`.

    Args:
        length: m, the number of virtual tokens.
        tokens: ids of the words whose embeddings P starts from, repeated if they are fewer than m;
            by default they are drawn from the vocabulary (`inject(..., seed=)`).
        task_type: PEFT's task type; inject takes it from the model.

    Raises:
        LoRAError: a value is out of range.

    Example:
        >>> PromptConfig(length=4, tokens=[7, 8]).tokens
        (7, 8)
    """

    length: int = 20
    tokens: tuple[int, ...] = ()
    task_type: str | None = None
    folder: ClassVar[str] = "prompt"

    def __post_init__(self) -> None:
        check("length", self.length, "rank")
        check("tokens", self.tokens, "token_rows")
        given = (self.tokens,) if isinstance(self.tokens, int) else self.tokens or ()
        object.__setattr__(self, "tokens", tuple(given))
        if len(self.tokens) > self.length:
            raise LoRAError(f"tokens: {len(self.tokens)} are more than the length, {self.length}")

    def fitted(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors in the form that this model needs: unchanged."""
        return dict(tensors)


def behind_padding(mask: Tensor, m: int) -> Tensor:
    """Indices (batch, m + n) that move the left padding of X before P: [padding; P; words].

    The distance from P to the words then does not depend on the batch. T5 sees distances only.
    """
    padding = F.pad(mask.cumsum(-1) == 0, (m, 0))  # (batch, m + n), False at P
    return (~padding).long().argsort(dim=-1, stable=True)


class PromptTuning(VirtualTokens):
    """The prompt in a model: an `inject.Extra`. P is the `prompt` of the encoder, or of a Llama."""

    folder = PromptConfig.folder

    def find(self, model: nn.Module) -> dict[str, Tensor]:
        """P, by its name on disk."""
        if self.config is None:
            return {}
        stack = self.stack
        like = torch.empty(self.config.length, stack.embed_tokens.weight.shape[1])  # (m, d)
        return {f"{self.folder}/prompt_embeddings": stack.prompt if self.hooks else like}

    @property
    def stack(self) -> Any:
        """The module that holds the prompt: the encoder, or the decoder of a Llama."""
        return self.stacks.get("encoder", self.stacks["decoder"])

    def start(self, model: nn.Module) -> None:
        """Add P and the hooks."""
        if self.config is None:
            return
        embed, m = self.stack.embed_tokens, self.config.length
        size, given = embed.weight.shape[0], self.config.tokens
        if not all(0 <= token < size for token in given):
            raise LoRAError(f"tokens: must lie in the vocabulary, 0 to {size - 1}")
        drawn = torch.randint(size, (m,)).tolist()
        ids = [given[i % len(given)] for i in range(m)] if given else drawn
        with torch.no_grad():
            # (m, d), scaled as the model scales its embeddings
            P = embed(torch.tensor(ids, device=embed.weight.device))
        self.stack.prompt = nn.Parameter(P.to(torch.promote_types(P.dtype, torch.float32)).clone())
        self.hooks.append(self.stack.register_forward_pre_hook(self.enter, with_kwargs=True))
        if "encoder" in self.stacks:
            decoder = self.stacks["decoder"]
            self.hooks.append(decoder.register_forward_pre_hook(self.widen, with_kwargs=True))
        else:
            self.hooks.append(self.stack.register_forward_hook(self.leave, with_kwargs=True))

    def enter(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the stack: put P before the embeddings, unless the cache already has it."""
        if not self.enabled:
            return None
        call, m = bound(stack, args, kwargs), self.config.length
        x, mask, past = call.get("inputs_embeds"), call.get("attention_mask"), cached(call)
        x = stack.embed_tokens(call["input_ids"]) if x is None else x  # (batch, n, d)
        limit = getattr(stack, "max_source_positions", None)  # BART counts them
        if limit is not None and m + x.shape[1] > limit:
            what = f"{m} virtual tokens and {x.shape[1]} tokens"
            raise LoRAError(f"{what} are more than the model's {limit} positions: cut the input")
        if "encoder" not in self.stacks:
            own = positions(call, x, past - m if past else 0) + m  # (batch or 1, n)
            first = torch.arange(m, device=x.device).expand(own.shape[0], m)
            call["position_ids"] = own if past else torch.cat([first, own], 1)
        if not past:
            P = stack.prompt.to(x.dtype).expand(x.shape[0], -1, -1)  # (batch, m, d)
            call |= {"input_ids": None, "inputs_embeds": torch.cat([P, x], 1)}
        if mask is not None and mask.ndim != 2:
            raise LoRAError("a prompt needs an attention_mask of shape (batch, tokens)")
        if mask is not None:
            call["attention_mask"] = F.pad(mask, (m, 0), value=1)  # (batch, m + n)
        if mask is not None and "encoder" in self.stacks:
            order = behind_padding(mask, m)
            call["attention_mask"] = call["attention_mask"].gather(1, order)
            rows = call["inputs_embeds"]  # (batch, m + n, d)
            call["inputs_embeds"] = rows.gather(1, order[..., None].expand_as(rows))
        return (), call

    def widen(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the decoder: extend the cross-attention's mask over the prompt."""
        call = bound(decoder, args, kwargs)
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if mask is not None and states is not None:
            m = states.shape[1] - mask.shape[-1]  # 0 if the prompt is disabled
            order = behind_padding(mask, m)
            call["encoder_attention_mask"] = F.pad(mask, (m, 0), value=1).gather(1, order)
        return (), call

    def leave(self, stack: Any, args: object, kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of a Llama's decoder: drop the prompt's states from the output."""
        past = cached(kwargs) - output[0].shape[1]  # before this call
        if self.enabled and past <= 0:
            output.last_hidden_state = output[0][:, self.config.length :]
        return output
