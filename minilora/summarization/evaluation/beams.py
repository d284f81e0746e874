"""The beams of a dialogue share its encoder states, keys and values.

transformers' `generate` copies the encoder's states for each of n beams, (b, s, d) to (b n, s, d).
Each decoder layer then computes, keeps and reads n equal copies of its keys and values. But
cross-attention has no causal mask, so the queries of n beams can be n positions of one sequence:

    softmax(Q K^T / sqrt(d_h)) V    with Q (b, h, n, d_h) instead of (b n, h, 1, d_h),
                                    K and V (b, h, s, d_h) instead of (b n, h, s, d_h)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Models whose cross-attention takes the shape of keys and values from the encoder's states.
SHARING = {"bart", "blenderbot", "m2m_100", "marian", "mbart", "pegasus", "t5"}


class BeamCache(EncoderDecoderCache):
    """The beams share the cross-attention's cache, so only that of self-attention is reordered."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.self_attention_cache.reorder_cache(cast(torch.LongTensor, beam_idx))


@contextmanager
def shared_beams(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block `generate` copies only the decoder's ids for the beams, not the states."""
    if model.config.model_type not in SHARING or model.config._attn_implementation != "sdpa":
        yield
        return
    _set_attention(model, "shared_beams")
    model._expand_inputs_for_generation = _expand_ids  # type: ignore[assignment]
    try:
        yield
    finally:
        del model._expand_inputs_for_generation
        _set_attention(model, "sdpa")


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Also in T5's decoder, which has a configuration of its own."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(name)


def _expand_ids(expand_size: int, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    inputs.pop("is_encoder_decoder")
    return input_ids.repeat_interleave(expand_size, dim=0), inputs


def attention(
    module: nn.Module, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of Q (b n, h, t, d_h) to K and V (b, h, s, d_h) under a mask (b, 1, t, s).

    Returns:
        (b n, t, h, d_h)
    """
    b, (rows, h, t, width) = len(K), Q.shape
    if rows == b:
        return sdpa_attention_forward(module, Q, K, V, mask, **options)
    # (b, h, n t, d_h)
    positions = Q.view(b, -1, h, t, width).transpose(1, 2).reshape(b, h, -1, width)
    if mask is not None:
        mask = mask[:, :, :1]  # padding: the same for every query
    options["is_causal"] = False
    output, _ = sdpa_attention_forward(module, positions, K, V, mask, **options)  # (b, n t, h, d_h)
    return output.reshape(rows, t, h, width), None


AttentionInterface.register("shared_beams", attention)
AttentionMaskInterface.register("shared_beams", sdpa_mask)
