"""What benchmarks/gpu.py runs on: random token ids and a BART of random weights."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from gpu_clock import Run

RANK, ALPHA, DROPOUT, RATE = 8, 32, 0.05, 1e-3
# facebook/bart-large's config.json, also where it equals the defaults of BartConfig.
LARGE = {
    "vocab_size": 50265,
    "d_model": 1024,
    "max_position_embeddings": 1024,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "activation_function": "gelu",
    "init_std": 0.02,
    "scale_embedding": False,
    **{f"{side}_layers": 12 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 16 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 4096 for side in ("encoder", "decoder")},
}
TINY = LARGE | {
    "vocab_size": 1000,
    "d_model": 64,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")},
}
# SAMSum under BART's tokenizer: share of the examples, tokens. Between them linear.
SOURCE = [(0.0, 12), (0.5, 121), (0.9, 294), (0.99, 511), (1.0, 800)]
TARGET = [(0.0, 6), (0.5, 24), (0.9, 47), (0.99, 70), (1.0, 94)]
PAD, BOS, EOS = 1, 0, 2


def examples(count: int, vocabulary: int, scale: float = 1.0, seed: int = 0) -> list[Any]:
    """Random token ids; lengths distributed as SAMSum's, long dialogues with long summaries.

    Args:
        count: of examples.
        vocabulary: of ids.
        scale: of the lengths, 1 for SAMSum's.
        seed: of lengths and ids.
    """
    from minilora.summarization.data.batches import Encoded

    normal = statistics.NormalDist()
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 2, generator=generator)
    z[:, 1] = 0.6 * z[:, 0] + 0.8 * z[:, 1]  # correlation 0.6

    def length(share: float, quantiles: Sequence[tuple[float, int]]) -> int:
        (low, a), (high, b) = next(pair for pair in pairwise(quantiles) if share <= pair[1][0])
        return max(3, round(scale * (a + (b - a) * (share - low) / (high - low))))

    def ids(number: int) -> list[int]:
        inner = torch.randint(4, vocabulary, (number - 2,), generator=generator)
        return [BOS, *inner.tolist(), EOS]

    return [
        Encoded(
            str(i),
            ids(length(normal.cdf(a), SOURCE)),
            ids(length(normal.cdf(b), TARGET)),
        )
        for i, (a, b) in enumerate(z.tolist())
    ]


def make_bart(run: Run) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(**(TINY if run.small or not run.cuda else LARGE))
    with torch.device(run.device):  # 406 million random weights: a second on a GPU
        model = BartForConditionalGeneration(config)
    return model.to(run.device).eval()


class Ids:
    """The part of a tokenizer that the step and `summarize` use; texts are ids."""

    pad_token_id = PAD
    all_special_ids = (PAD, EOS)

    def __call__(self, text_target: list[str], **_: Any) -> dict[str, Any]:
        """A target ends with EOS, and nothing begins it."""
        rows = [[EOS + 1, EOS] if text else [EOS] for text in text_target]
        return {"input_ids": rows, "special_tokens_mask": [[0] * len(row) for row in rows]}

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [" ".join(str(i) for i in row if i > EOS) for row in rows.tolist()]
