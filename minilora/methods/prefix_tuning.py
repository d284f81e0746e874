"""Prefix tuning: each attention of a frozen model reads additional, trained keys and values.

Li and Liang 2021, Prefix-Tuning (https://arxiv.org/abs/2101.00190), section 4.2: in every layer
attention reads m more keys and values,

    softmax(Q [P_K; K]^T / sqrt(w)) [P_V; V]    with P_K, P_V (m, w) of each head, w its width

in the encoder's self-attention, the decoder's, and cross-attention. Section 4.3 trains them through
an MLP with a hidden layer, because that is more stable:

    P = tanh(P' W1^T + b1) W2^T + b2            P' (m, d)

Files hold P only: saving folds the MLP into it. As in PEFT, the positions of the decoder's own
tokens start at m; in the encoder positions do not change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import linears
from minilora.config import LoRAError, check
from minilora.methods.virtual_tokens import VirtualTokens, bound, cached, positions, stacks

PLACES = {
    "encoder": ("encoder", ("self_attn", "SelfAttention")),
    "decoder": ("decoder", ("self_attn", "SelfAttention")),
    "cross": ("decoder", ("encoder_attn", "EncDecAttention")),
}
"""Place -> the stack, and the last part of its attentions' names: in BART and Llama, and in T5."""


@dataclass(frozen=True)
class PrefixConfig:
    """Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190); see `inject`.

    Args:
        length: m, the number of additional keys and values.
        places: any of "encoder" (its self-attention), "decoder" (its self-attention) and "cross"
            (the decoder's cross-attention). A Llama has a "decoder" only.
        reparametrize: width of the MLP's hidden layer; None trains P itself, which needs a higher
            learning rate (with AdamW about thirty times as high).
        task_type: PEFT's task type; inject takes it from the model.

    Raises:
        LoRAError: a value is out of range.

    Example:
        >>> PrefixConfig(length=4, places=["decoder"]).places
        ('decoder',)
    """

    length: int = 20
    places: tuple[str, ...] = tuple(PLACES)
    reparametrize: int | None = 512
    task_type: str | None = None
    folder: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        check("length", self.length, "rank")
        if self.reparametrize is not None:
            check("reparametrize", self.reparametrize, "rank")
        check("places", self.places, "targets")
        places = (self.places,) if isinstance(self.places, str) else tuple(self.places)
        if not places or not set(places) <= PLACES.keys():
            raise LoRAError(f"places must be some of {', '.join(PLACES)}, not {self.places!r}")
        object.__setattr__(self, "places", tuple(p for p in PLACES if p in places))

    def fitted(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors without the unused layers that PEFT's files may hold."""
        key, stack = f"{self.folder}/decoder", stacks(model, self.folder)["decoder"]
        layers = len(attentions(stack, "decoder"))
        return {k: t[:, :layers] if k == key else t for k, t in tensors.items()}


def attentions(stack: nn.Module, place: str) -> list[Any]:
    """The attention modules of a place, one for each layer."""
    return [m for name, m in stack.named_modules() if name.endswith(PLACES[place][1])]


class Prefix(nn.Module):
    """P of one place, (m, layers, 2, heads, width): a parameter, or the output of an MLP.

    Args:
        shape: of P.
        like: a weight of the model; P has its device, and at least float32.
        hidden: width of the MLP's hidden layer; None: no MLP.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor, hidden: int | None) -> None:
        super().__init__()
        self.weights = nn.ParameterDict()
        m, layers, _, heads, width = self.shape = shape
        d, out = heads * width, 2 * heads * width
        sizes: dict[str, tuple[int, ...]] = {"P": shape}
        if hidden is not None:
            sizes = {"P": (m, d), "W1": (hidden, d), "b1": (hidden,)}
            sizes |= {"W2": (layers, out, hidden), "b2": (layers, out)}
        dtype = torch.promote_types(like.dtype, torch.float32)
        for name, size in sizes.items():
            # W1 and W2 as in nn.Linear, uniform in +-1 / sqrt(inputs); b1 and b2 in their own
            # +-1 / sqrt(outputs). P and P' are normal.
            values = torch.empty(size).uniform_(-1, 1) / size[-1] ** 0.5
            values = torch.randn(size) if name == "P" else values
            self.weights[name] = nn.Parameter(values.to(like.device, dtype))

    def forward(self, layer: int) -> Any:
        """P of one layer: (m, 2, heads, width)."""
        w: Any = self.weights
        if "W1" not in w:
            return w["P"][:, layer]
        hidden = torch.tanh(F.linear(w["P"], w["W1"], w["b1"]))  # (m, hidden)
        P = F.linear(hidden, w["W2"][layer], w["b2"][layer])  # (m, 2 heads width)
        return P.view(self.shape[0], *self.shape[2:])

    def folded(self) -> Any:
        """P of all layers; without an MLP the parameter itself."""
        if "W1" not in self.weights:
            return self.weights["P"]
        return torch.stack([self(layer) for layer in range(self.shape[1])], 1)


class Prefixed:
    """A stand-in for the cache of one attention: it returns the cached keys and values after P.

    The decoder's self-attention cache never holds P, so lengths, beams and positions stay as they
    are. The cross-attention cache does hold it: it is written once and read in every later step.
    """

    def __init__(self, cache: Any, cross: bool, P: Tensor) -> None:
        self.cache, self.cross, self.P = cache, cross, P

    def get_seq_length(self, layer: int = 0) -> int:
        """The length with P, from which T5 counts its positions."""
        return self.P.shape[0] + (0 if self.cache is None else self.cache.get_seq_length(layer))

    def update(self, K: Tensor, V: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, n, width) after those of P: (.., m + n, width)."""
        if self.cache is not None and not self.cross:
            own = getattr(self.cache, "self_attention_cache", self.cache)
            K, V = own.update(K, V, layer)
        P = self.P.to(K.dtype).permute(1, 2, 0, 3)[:, None].expand(-1, K.shape[0], -1, -1, -1)
        K, V = torch.cat([P[0], K], -2), torch.cat([P[1], V], -2)
        if self.cache is not None and self.cross:
            self.cache.cross_attention_cache.update(K, V, layer)
            self.cache.is_updated[layer] = True
        return K, V


class PrefixTuning(VirtualTokens):
    """The prefixes in a model: an `inject.Extra`. Each is the `prefix_<place>` of its stack."""

    folder = PrefixConfig.folder

    def __init__(self, model: nn.Module, config: Any, _: object) -> None:
        super().__init__(model, config, _)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for place in self.config.places if self.config is not None else ():
            stack = self.stacks.get(PLACES[place][0])
            found = attentions(stack, place) if stack is not None else []
            if not found:
                what = f"{place!r}: {type(model).__name__} has no such attention"
                raise LoRAError(f"places: {what}; name others, such as places=('decoder',)")
            k = getattr(found[0], "k_proj", None) or found[0].k
            width = getattr(found[0], "head_dim", None) or found[0].key_value_proj_dim
            heads = linears.shape(getattr(k, "base", k))[0] // width
            self.shapes[place] = (self.config.length, len(found), 2, heads, width)
        kind = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if self.shapes and kind not in ("eager", "sdpa"):
            raise LoRAError("a prefix needs attn_implementation 'eager' or 'sdpa' in the model")

    def find(self, model: nn.Module) -> dict[str, Tensor]:
        """P of each place, by its name on disk."""
        found = {place: torch.empty(shape) for place, shape in self.shapes.items()}
        found |= {place: self.prefix(place).folded() for place in found if self.hooks}
        return {f"{self.folder}/{place}": P for place, P in found.items()}

    def prefix(self, place: str) -> Any:
        """The `Prefix` of a place."""
        return getattr(self.stacks[PLACES[place][0]], f"prefix_{place}")

    def start(self, model: nn.Module) -> None:
        """Add the parameters and the hooks."""
        for place, shape in self.shapes.items():
            stack = self.stacks[PLACES[place][0]]
            prefix = Prefix(shape, stack.embed_tokens.weight, self.config.reparametrize)
            stack.add_module(f"prefix_{place}", prefix)
            for layer, attention in enumerate(attentions(stack, place)):
                hook = partial(self.enter, place, layer)
                self.hooks.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
        if "decoder" in self.shapes:
            decoder = self.stacks["decoder"]
            if hasattr(decoder, "embed_positions"):  # BART
                table = decoder.embed_positions
                self.hooks.append(table.register_forward_pre_hook(self.move, with_kwargs=True))
            if hasattr(decoder, "rotary_emb"):  # Llama
                self.hooks.append(decoder.register_forward_pre_hook(self.count, with_kwargs=True))

    def enter(
        self, place: str, layer: int, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Pre-hook of an attention: put P before its keys and values, and extend its mask."""
        if not self.enabled:
            return None
        m, x = self.config.length, args[0] if args else kwargs["hidden_states"]  # (batch, n, d)
        name = "mask" if "mask" in kwargs else "attention_mask"  # T5's, others'
        cache, mask, n = kwargs.get("past_key_values"), kwargs.get(name), x.shape[1]
        # sdpa's is_causal would mask as if query 0 were at key 0, which is P's first.
        if mask is None and attention.is_causal and n > 1:
            mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=x.device).tril()
        if mask is not None:
            mask = F.pad(mask, (m, 0), value=True if mask.dtype == torch.bool else 0.0)
        kwargs |= {name: mask}
        if place == "encoder" and getattr(attention, "has_relative_attention_bias", False):
            bias = attention.compute_bias(n, n, device=x.device)  # 0 towards P
            kwargs |= {"position_bias": F.pad(bias, (m, 0))}
        if place != "cross" or cache is None or not cache.is_updated.get(attention.layer_idx):
            P = self.prefix(place)(layer)  # (m, 2, heads, width)
            kwargs |= {"past_key_values": Prefixed(cache, place == "cross", P)}
        return args, kwargs

    def move(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the position embeddings of BART's decoder: count from m."""
        if not self.enabled:
            return None
        return args, kwargs | {"position_ids": kwargs["position_ids"] + self.config.length}

    def count(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of a Llama's decoder: count the positions from m."""
        call = bound(stack, args, kwargs)
        x = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
        if self.enabled:
            call["position_ids"] = positions(call, x, cached(call)) + self.config.length
        return (), call
