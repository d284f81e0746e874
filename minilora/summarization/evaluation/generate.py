"""Summaries by beam search; base and fine-tuned model are decoded alike and compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicCache

import minilora

from .. import processes
from ..data.batches import Encoded, by_length, collate, end_token
from ..data.reading import Example
from ..errors import UserError
from ..model.device import autocast
from ..model.encoder_cache import EncoderStates
from ..model.requirements import positions, special_tokens
from ..model.speed import uncompiled
from ..settings import GenerationOptions
from .beams import BeamCache, shared_beams
from .compare import Evaluation, Summary, compare
from .rouge import require_rouge


class _Finite(LogitsProcessor):
    """Records, on the device, the rows with a logit that is NaN or infinite."""

    bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~scores.amax(dim=-1).isfinite()  # (rows,); -inf forbids a token, but never all
        self.bad = bad if self.bad is None else self.bad | bad
        return scores

    def check(self, ids: Sequence[str]) -> None:
        """Raise an error if a summary was chosen by such logits.

        Args:
            ids: of the dialogues. Each has one row for each beam.

        Raises:
            UserError: it names these dialogues.
        """
        bad = [] if self.bad is None else self.bad.view(len(ids), -1).any(dim=1).tolist()
        if named := [name for name, is_bad in zip(ids, bad, strict=False) if is_bad]:
            raise UserError(
                f"the logits are not finite while summarizing {', '.join(named)}: the weights or "
                "the adapter hold NaN, or fp16 overflows: train with --precision fp32, or use "
                "--device cpu"
            )


def summarize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    generation: GenerationOptions,
    autocast_dtype: torch.dtype | None = None,
    progress: str | None = None,
    states: EncoderStates | None = None,
) -> list[Summary]:
    """One summary for each dialogue, in the order given; beam search by transformers' `generate`.

    Dialogues of similar length share a batch, so there is little padding. With several processes
    each takes its shard of the batches, and all get all summaries. The settings override the
    checkpoint's; the special tokens are those of training. Mode and generation config are restored.

    Args:
        autocast_dtype: the precision; None: that of the weights.
        progress: the title of a bar; None: no bar.
        states: of this model's encoder; None: they are computed here.

    Raises:
        UserError: settings that contradict each other or go beyond the model's positions; logits
            that are not finite.
    """
    settings = generate_arguments(model, generation)
    target = encoded[0].target if encoded else [end_token(tokenizer)]
    tokens = GenerationConfig(**special_tokens(model, tokenizer, target))
    batches = processes.shard(by_length(encoded, generation.evaluation_batch_size))
    device, pad = next(model.parameters()).device, cast(int, tokenizer.pad_token_id)

    def write() -> list[tuple[int, str, int]]:
        """Position, text and number of tokens of each summary."""
        found: list[tuple[int, str, int]] = []
        total = sum(map(len, batches))
        bar = tqdm(total=total, desc=progress, unit="dialogue", disable=progress is None)
        modes = _evaluation_mode(model, tokens)
        with bar, modes, shared_beams(model), uncompiled(model), autocast(device, autocast_dtype):
            for chosen in batches:
                rows, finite = [encoded[i] for i in chosen], _Finite()
                batch: dict[str, Any] = {k: t.to(device) for k, t in collate(rows, pad).items()}
                del batch["labels"]
                if states:
                    with torch.no_grad():
                        batch["encoder_outputs"] = states.batch(model, [r.source for r in rows])
                output = cast(Any, model).generate(  # `generate` computes no gradients
                    **batch,
                    past_key_values=BeamCache(DynamicCache(), DynamicCache()),
                    logits_processor=LogitsProcessorList([finite]),
                    **settings,
                )
                finite.check([row.id for row in rows])
                texts = tokenizer.batch_decode(output, skip_special_tokens=True)
                lengths = (output != pad).sum(dim=1).tolist()
                found += zip(chosen, map(str.strip, texts), lengths, strict=True)
                bar.update(len(chosen))
        return found

    parts = processes.run_on_all(write)
    summaries = {i: Summary(text, tokens) for part in parts for i, text, tokens in part}
    return [summaries[i] for i in range(len(encoded))]


def generate_arguments(model: PreTrainedModel, options: GenerationOptions) -> dict[str, Any]:
    """`generate`'s arguments; they override the checkpoint's generation config.

    Raises:
        UserError: settings that contradict each other or go beyond the model's positions.
    """
    most = positions(model, "decoder") or options.max_length
    if min(options.beams, options.evaluation_batch_size) < 1:
        raise UserError("--beams and --evaluation-batch-size must be at least 1")
    if not 0 <= options.min_length <= options.max_length <= most:
        raise UserError(
            f"need 0 <= --min-length <= --max-length <= {most} (the model's positions), not "
            f"{options.min_length} and {options.max_length}"
        )
    settings: dict[str, Any] = {
        "num_beams": options.beams,
        "min_length": options.min_length,
        "max_length": options.max_length,
        "no_repeat_ngram_size": options.no_repeat_ngram,
        "do_sample": False,
    }
    if options.beams > 1:  # greedy search would warn
        settings |= {"length_penalty": options.length_penalty, "early_stopping": True}
    return settings


@contextmanager
def _evaluation_mode(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Inside the block dropout is off, and `config` replaces the checkpoint's decoding settings.

    Afterwards each module has its own mode again, even if the modes were mixed.
    """
    modes = [(module, module.training) for module in model.modules()]
    before, model.generation_config = model.generation_config, config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = before
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    generation: GenerationOptions,
    *,
    data: str = "",
    split: str = "test",
    base_model: PreTrainedModel | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
    states: EncoderStates | None = None,
) -> Evaluation:
    """The base and the fine-tuned model on the same dialogues.

    The base is `model` with its adapter disabled: the same weights in memory, no copy. Full
    fine-tuning overwrites them, so `base_model` is the base read again. Decoding is faster if the
    adapter was merged before.

    Args:
        states: of the fine-tuned model's encoder; the base reads them too if its encoder is the
            same.

    Raises:
        UserError: no dialogues, impossible settings, or rouge_score is not installed.
    """
    require_rouge()
    if [example.id for example in examples] != [row.id for row in encoded]:
        raise ValueError("`encoded` is not the encoding of `examples`, in their order")

    def decode(which: PreTrainedModel, title: str) -> list[Summary]:
        bar, kept = title if progress else None, states
        if kept and not kept.belong_to(which):
            kept = None
        return summarize(which, tokenizer, encoded, generation, autocast_dtype, bar, kept)

    with minilora.disabled(model) if base_model is None else nullcontext():
        base = decode(base_model or model, "base")
    finetuned = decode(model, "fine-tuned")
    settings = asdict(generation) | {"autocast": str(autocast_dtype) if autocast_dtype else None}
    return compare(base, finetuned, examples, data=data, split=split, generation=settings)
