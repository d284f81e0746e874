"""The model that is pre-trained, its optimizers, and its loss on texts read or held out."""

import argparse

import numpy as np
import torch
from cpu import CrossEntropy
from muon import Muon
from torch import Tensor
from torch.nn import functional
from transformers import BartConfig, BartForConditionalGeneration

from examples import BOS, EOS, PAD, STAGES, Batch, Source, chunks, collate

SHAPE = ("layers", "decoder_layers", "width", "heads", "init_std")  # what the model is made from


def loss_of(
    model: BartForConditionalGeneration, batch: Batch, device: str, precision: str = "bf16"
) -> Tensor:
    """Mean cross-entropy over real positions; padding never meets the vocabulary."""
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    labels = batch.pop("labels")
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        if device == "cpu":  # fewer rows; on a GPU counting them would wait for it
            hidden, labels = hidden[labels != PAD], labels[labels != PAD]
            if hidden.requires_grad and precision == "bf16":
                h, W = hidden.bfloat16(), model.lm_head.weight.bfloat16()
                with torch.autocast(device, enabled=False):
                    loss: Tensor = CrossEntropy.apply(h, W, labels)  # type: ignore[no-untyped-call]
                return loss
        logits = functional.linear(hidden, model.lm_head.weight)
    return functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=PAD
    )


def shuffled(batch: Batch) -> Batch:
    """The same targets with the next example's source."""
    return {
        key: value.roll(1, 0) if key in {"input_ids", "attention_mask"} else value
        for key, value in batch.items()
    }


COUNTS = {"chat": 96, "prose": 64, "gap": 128, "pseudo": 64, "service": 96, "game": 96,
          "narrative": 74, "line": 74}  # fmt: skip


def evaluation_batches(held: Source) -> dict[str, list[Batch]]:
    """A fixed sample of held-out examples of every task."""
    sets: dict[str, list[Batch]] = {}
    for task, count in COUNTS.items():
        rng = np.random.default_rng(1)
        examples = [held.example(task, STAGES[-1], rng) for _ in range(count)]
        sets[task] = [collate(part) for part in chunks(examples, 16_000) if len(part) > 1]
    return sets


@torch.no_grad()
def samples(model: BartForConditionalGeneration, held: Source, device: str) -> str:
    """Held-out chats retold, beside what was written of them."""
    model.eval()
    rng = np.random.default_rng(2)
    texts: list[str] = []
    for task, count in (("narrative", 12), ("line", 6), ("service", 5), ("game", 2)):
        for _ in range(count):
            source, target = held.example(task, STAGES[-1], rng)
            with torch.autocast(device, dtype=torch.bfloat16):
                written = model.generate(
                    input_ids=torch.tensor([source], device=device), num_beams=4,
                    max_new_tokens=80, no_repeat_ngram_size=3, early_stopping=True,
                )[0]  # fmt: skip
            decode = held.tokenizer.decode
            texts.append(
                f"--- {task}\n{decode(source)}\n  WRITTEN  {decode(target)}\n"
                f"  MODEL    {decode(written.tolist())}\n"
            )
    model.train()
    return "\n".join(texts)


@torch.no_grad()
def evaluate(
    model: BartForConditionalGeneration,
    sets: dict[str, list[Batch]],
    device: str,
    precision: str = "bf16",
) -> dict[str, float]:
    """Held-out loss by task with the right source and with another example's."""
    model.eval()
    scores: dict[str, float] = {}
    for task, batches in sets.items():
        for kind in ("right", "wrong"):
            total = count = 0.0
            for batch in batches:
                real = float((batch["labels"] != PAD).sum())
                given = batch if kind == "right" else shuffled(batch)
                total += float(loss_of(model, given, device, precision)) * real
                count += real
            scores[f"{task}_{kind}"] = round(total / count, 4)
    model.train()
    return scores


def new_model(arguments: argparse.Namespace) -> BartForConditionalGeneration:
    """A BART with random weights; dropout is off, since no text is read twice for long."""
    config = BartConfig(
        vocab_size=8192, d_model=arguments.width, max_position_embeddings=512,
        encoder_layers=arguments.layers, decoder_layers=arguments.decoder_layers,
        encoder_attention_heads=arguments.heads, decoder_attention_heads=arguments.heads,
        encoder_ffn_dim=4 * arguments.width, decoder_ffn_dim=4 * arguments.width,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, init_std=arguments.init_std,
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def new_optimizers(
    model: BartForConditionalGeneration, kind: str, rate: float, precision: str = "bf16"
) -> list[torch.optim.Optimizer]:
    """AdamW, and for the layers' matrices Muon if `kind` says so.

    Muon (Jordan 2024) steps along the orthogonal matrix nearest to the momentum, so that no
    direction learns slower than the rest; with AdamW's size of step (Liu et al. 2025, section 2.2)
    one rate does for both. Embeddings are rows that are looked up, no maps: AdamW.
    """
    parameters = dict(model.named_parameters())
    hidden = {
        n: p for n, p in parameters.items() if kind == "muon" and p.dim() == 2 and "layers." in n
    }
    rest = [p for name, p in parameters.items() if name not in hidden]
    adamw = torch.optim.AdamW(
        [{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.01},
         {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    if not hidden:
        return [adamw]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    muon = Muon(hidden.values(), lr=rate, weight_decay=0.01, dtype=dtype)
    return [adamw, muon]
