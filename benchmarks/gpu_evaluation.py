"""Summaries by the base, by the adapter unmerged and merged, and by PEFT, for benchmarks/gpu.py."""

import copy
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from gpu_clock import Run, timed
from gpu_contestants import ALL, DECODER, peft_model
from gpu_models import ALPHA, PAD, RANK, Ids

BOTH = "minilora, base and fine-tuned model, encoder computed once"


def first_logits(run: Run, model: Any, rows: Any) -> torch.Tensor:
    from minilora.summarization.data.batches import collate

    batch = {key: t.to(run.device) for key, t in collate(rows, PAD).items()}
    with torch.no_grad(), torch.autocast(torch.device(run.device).type, torch.bfloat16):
        return model(**batch).logits.float()


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def evaluation(run: Run, base: Any, rows: Any, deadline: float) -> dict[str, Any]:
    """The same beam search by the base, by the adapter unmerged and merged, and by PEFT."""
    import minilora
    from minilora import LoRAConfig
    from minilora.summarization.evaluation.generate import summarize
    from minilora.summarization.model.encoder_cache import keep_states, of_encoder
    from minilora.summarization.model.speed import hold_frozen_linears
    from minilora.summarization.settings import GenerationOptions

    began = time.monotonic()
    size, length = (4, 8) if run.small or not run.cuda else (32, 32)
    options = GenerationOptions(
        beams=4, min_length=length, max_length=length, evaluation_batch_size=size
    )

    def start(model: Any) -> Any:
        """A and B are random, the same for all, so that the adapter says something."""
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                scale = 0.1 if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return model.requires_grad_(False).eval()

    notes: list[str] = []
    models: dict[str, Any] = {}
    logits: dict[str, torch.Tensor] = {}
    chosen = sorted(rows, key=lambda row: len(row.source))[len(rows) // 2 :][:size]

    def add(name: str, make: Callable[[], Any]) -> None:
        try:
            model = make()
            logits[name] = first_logits(run, model, chosen[:4])
            models[name] = model
        except Exception as error:
            traceback.print_exc()
            notes.append(f"{name}: {type(error).__name__}: {error}"[:600])

    def ours(merged: bool, where: str = ALL) -> Any:
        model = copy.deepcopy(base)
        minilora.inject(model, LoRAConfig(rank=RANK, alpha=ALPHA, targets=where))
        start(model)
        if merged:
            minilora.unwrap(model)
        hold_frozen_linears(model, torch.bfloat16)
        return model

    def plain() -> Any:
        model = copy.deepcopy(base).requires_grad_(False)
        hold_frozen_linears(model, torch.bfloat16)
        return model

    add("base", plain)
    add("minilora, merged", lambda: ours(True))
    add("minilora, unmerged", lambda: ours(False))
    add("PEFT, unmerged", lambda: start(peft_model(base)))
    add(BOTH, lambda: ours(False, DECODER))
    tokenizer: Any = Ids()
    encoder = of_encoder(models[BOTH]) if BOTH in models else ""  # its digest, outside the timing
    seconds: dict[str, list[float]] = {name: [] for name in models}
    texts: dict[str, list[str]] = {}
    results: dict[str, Any] = {}
    about = {
        "batch": size,
        "beams": 4,
        "tokens_of_a_summary": length,
        "precision": "bf16 autocast; minilora and the base hold linears in bf16, PEFT as people do",
        "two models": "seconds of one of the two, the adapter in the decoder only",
        "logits": "largest difference, as a share of the largest logit; B is random",
    }

    def figures(name: str) -> dict[str, Any]:
        """Ratios and differences only to those that are there."""
        median = statistics.median(seconds[name])
        row = {"dialogues_per_second": size / median, "seconds": seconds[name]}
        if "base" in models:
            pairs = zip(seconds[name], seconds["base"], strict=True)
            row["times_the_base"] = statistics.median(a / b for a, b in pairs)
            same = [a == b for a, b in zip(texts[name], texts["base"], strict=True)]
            row["same_texts_as_the_base"] = sum(same) / len(same)
        for other, key in (("base", "the_base"), ("minilora, merged", "merged")):
            if other in logits:
                row[f"logits_differ_from_{key}_by"] = apart(logits[name], logits[other])
        return row

    rounds = 2 if run.small else 5
    for i in range(rounds + 1):
        if i > 2 and time.monotonic() + (time.monotonic() - began) / i > deadline:
            notes.append(f"{rounds + 1 - i} of {rounds} rounds left out, the time was over")
            break
        names, first = list(models), i % max(1, len(models))
        for name in names[first:] + names[:first]:
            written: list[Any] = []

            def write(model: Any = models[name], written: list[Any] = written) -> None:
                written += summarize(model, tokenizer, chosen, options, torch.bfloat16)

            def write_both(model: Any = models[name], written: list[Any] = written) -> None:
                sources = [row.source for row in chosen]
                states = keep_states(model, sources, torch.bfloat16, "on", run.scratch, encoder)
                how = (tokenizer, chosen, options, torch.bfloat16, None, states)
                written += summarize(model, *how)
                with minilora.disabled(model):
                    summarize(model, *how)

            try:
                both = name == BOTH
                spent = timed(run.device, write_both if both else write) / (2 if both else 1)
            except Exception as error:
                traceback.print_exc()
                notes.append(f"{name}: {type(error).__name__}: {error}"[:600])
                del models[name]
                continue
            texts[name] = [summary.text for summary in written]
            if i:  # the first round is warm-up
                seconds[name].append(spent)
        if i:
            results = {name: figures(name) for name in models}
            run.partial = {"about": about, "results": results, "notes": notes}
    for name, row in results.items():
        shown = (f"{key} {value:.4f}" for key, value in row.items() if key != "seconds")
        print(f"{name:24}", *shown, sep="  ")
    print(*notes, sep="\n")
    return {"about": about, "results": results, "notes": notes}
