"""The floating-point operations of a step of BART, and the rate of the machine.

A multiply-add counts as two. d is the width, f the width of the feed-forward, v the vocabulary, s
and t the real source and target tokens of one example (padding does not count), L the layers of
each side. The forward pass:

    encoder, a layer     s (8 d^2 + 4 d f)              q, k, v, o; the two of the feed-forward
                       + 4 s^2 d                        Q K^T and P V
    decoder, a layer     t (8 d^2 + 4 d f) + 4 t^2 d    the same (causal attention counts in full)
                       + 4 t d^2 + 4 s d^2 + 4 s t d    cross-attention: q, o; k, v; Q K^T, P V
    head                 2 t d v

In the backward pass a product with a frozen weight needs one more product (for its input), a
product with a trained weight two, and Q K^T and P V two each. So a step needs 2 x the linear part +
3 x attention with LoRA, and 3 x both when all weights train. LoRA's own products (r / d of a
linear) are left out.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from common import synchronize
from turns import Turns

SHAPES = ((1024, 768, 3072), (1024, 1024, 4096), (2048, 2048, 2048), (8192, 4096, 4096))


def step_flops(
    config: Mapping[str, int],
    lengths: Sequence[tuple[int, int]],
    full: bool,
    encoder: Literal["trained", "frozen", "cached"] = "trained",
) -> float:
    """Operations of one training step on examples of (s, t) real tokens; see above.

    Args:
        config: d_model, encoder_layers, decoder_layers, encoder_ffn_dim, decoder_ffn_dim,
            vocab_size, as in BART's config.json.
        lengths: (s, t) of each example.
        full: all weights train, not an adapter.
        encoder: frozen: no adapter lies in it, so it is computed forward only; cached: not at all.
            k and v of the cross-attention have no input that needs a gradient then.
    """
    frozen = encoder != "trained"
    d, v = config["d_model"], config["vocab_size"]
    linear = attention = forward = 0.0
    for s, t in lengths:
        own = s * (8 * d**2 + 4 * d * config["encoder_ffn_dim"])
        if frozen:
            forward += config["decoder_layers"] * 4 * s * d**2
        if encoder == "frozen":
            forward += config["encoder_layers"] * (own + 4 * s**2 * d)
        elif not frozen:
            linear += config["encoder_layers"] * own
            attention += config["encoder_layers"] * 4 * s**2 * d
            linear += config["decoder_layers"] * 4 * s * d**2
        own = t * (8 * d**2 + 4 * d * config["decoder_ffn_dim"])
        linear += config["decoder_layers"] * (own + 4 * t * d**2)
        attention += config["decoder_layers"] * (4 * t**2 * d + 4 * s * t * d)
        linear += 2 * t * d * v
    return (3 if full else 2) * linear + 3 * attention + forward


def matrix_rate(turns: Turns, device: str, dtype: torch.dtype, seconds: float) -> None:
    """A contestant that multiplies matrices and answers with the FLOP/s of each shape."""
    kinds = SHAPES if device.startswith("cuda") else SHAPES[:3]
    pairs = []
    for n, k, m in kinds:
        x, w = torch.randn(n, k, device=device), torch.randn(m, k, device=device)
        pairs.append((x.to(dtype), w.to(dtype)))
        F.linear(*pairs[-1])
    turns.answer({})
    while True:
        turns.wait()
        rates: dict[str, Any] = {}
        for (n, k, m), (x, w) in zip(kinds, pairs, strict=True):
            synchronize()
            start, count = time.perf_counter(), 0
            while (passed := time.perf_counter() - start) < seconds or not count:
                for _ in range(4):
                    F.linear(x, w)  # (n, k) (k, m)
                synchronize()
                count += 4
            passed = time.perf_counter() - start
            rates[f"{n}x{k}x{m}"] = 2 * n * k * m * count / passed
        turns.answer({"rates": rates, "best": max(rates.values())})
