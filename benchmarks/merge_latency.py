"""Does a merged adapter cost anything at inference? Does an active one?

    python benchmarks/merge_latency.py [--device cuda] [--rounds 24]

Five models with the same weights take turns in every round: the base, the base with an active
adapter (rank 8 on q_proj and v_proj, B random), the same merged, and the same unwrapped. They are
timed on a forward pass over 8 dialogues of 64 tokens, and on greedy decoding of 64 tokens. The base
is timed twice, as two models; their ratio shows the noise. Weights are random, since the latency
does not depend on them.
"""

import copy
import math
from collections.abc import Callable

import torch
from common import alternate, parser, summary, write_result
from transformers import BartConfig, BartForConditionalGeneration

import minilora
from minilora import LoRAConfig

# BART-base's dimensions (Lewis et al. 2020).
SHAPE = {
    "vocab_size": 50265,
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}
NEW_TOKENS = 64


def build(device: str) -> dict[str, BartForConditionalGeneration]:
    """The contestants: copies of one model in five states."""
    torch.manual_seed(0)
    base = BartForConditionalGeneration(BartConfig(**SHAPE)).eval().to(device)
    models = {"base": base, "base again": copy.deepcopy(base)}
    for name in ("adapter active", "merged", "unwrapped"):
        model = copy.deepcopy(base)
        minilora.inject(model, LoRAConfig(rank=8, alpha=32, targets=("q_proj", "v_proj")))
        generator = torch.Generator().manual_seed(1)
        for parameter in minilora.trainable_parameters(model):
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values)
        models[name] = model
    minilora.merge(models["merged"])
    minilora.unwrap(models["unwrapped"])
    return models


@torch.inference_mode()
def check(models: dict[str, BartForConditionalGeneration], batch: dict[str, torch.Tensor]) -> None:
    """The adapter does something, and merging changes its output by no more than rounding."""
    logits = {name: model(**batch).logits for name, model in models.items()}
    effect = (logits["adapter active"] - logits["base"]).abs().max().item()
    for name in ("merged", "unwrapped"):
        error = (logits[name] - logits["adapter active"]).abs().max().item()
        assert effect > 100 * error, (name, effect, error)
    assert torch.equal(logits["merged"], logits["unwrapped"])


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=24, help="of the forward; decoding: half")
    flags.add_argument("--warmup", type=int, default=2)
    options = flags.parse_args()
    if options.small:
        options.rounds, options.warmup = 2, 1

    models = build(options.device)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 50264, (8, 64), generator=generator).to(options.device)
    prefix = torch.randint(4, 50264, (8, 32), generator=generator).to(options.device)
    batch = {"input_ids": ids, "decoder_input_ids": prefix}
    check(models, batch)

    def forward(model: BartForConditionalGeneration) -> Callable[[], object]:
        return lambda: model(**batch)

    def decode(model: BartForConditionalGeneration) -> Callable[[], object]:
        settings = {"num_beams": 1, "do_sample": False}
        tokens = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        return lambda: model.generate(input_ids=ids[:1], **tokens, **settings)

    with torch.inference_mode():
        result = {}
        for task, make in (("forward", forward), ("decode", decode)):
            contestants = {name: make(model) for name, model in models.items()}
            rounds = options.rounds if task == "forward" else math.ceil(options.rounds / 2)
            seconds = alternate(contestants, rounds, options.warmup)
            result[task] = summary(seconds, "base")
            for name, row in result[task].items():
                ms = 1000 * row["median_seconds"]
                print(f"{task:8} {name:15} {ms:9.1f} ms  {row['ratio']:.3f}")
    settings = {
        "device": options.device,
        "rounds": options.rounds,
        "model": "BART-base dimensions, fp32, random weights",
        "adapter": "rank 8 on q_proj and v_proj",
        "forward_shape": "8 x 64 source tokens, 8 x 32 target tokens",
        "decode_shape": f"1 x 64 source tokens, {NEW_TOKENS} new tokens, greedy",
    }
    content = {"settings": settings, "results": result}
    print(write_result("merge_latency", content, options.small))


if __name__ == "__main__":
    main()
