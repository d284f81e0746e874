"""Summaries by beam search, and the base beside the fine-tuned model, decoded alike."""

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
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import minilora

from .. import processes
from ..data.batches import Encoded, by_length, collate, end_token
from ..data.reading import Example
from ..errors import UserError
from ..model.device import autocast
from ..model.requirements import positions, special_tokens
from ..model.speed import uncompiled
from ..settings import GenerationOptions
from .compare import Evaluation, Summary, compare
from .rouge import require_rouge


class _BeamCache(EncoderDecoderCache):
    """The beams of a dialogue share its encoder output, so only the self-attention is reordered.

    The stock cache also copies the cross-attention's keys and values (batch x beams, heads,
    source, head_dim) onto equal rows, in every layer at every token: a quarter of the time.
    """

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.self_attention_cache.reorder_cache(cast(torch.LongTensor, beam_idx))


class _Finite(LogitsProcessor):
    """Remembers, on the device, for which rows a logit was NaN or infinite."""

    bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~scores.amax(dim=-1).isfinite()  # (rows,); -inf forbids a token, but never all
        self.bad = bad if self.bad is None else self.bad | bad
        return scores

    def check(self, ids: Sequence[str]) -> None:
        """Refuse the summaries that such logits chose.

        Args:
            ids: of the dialogues. Each has as many rows as beams, or one.
        """
        bad = [] if self.bad is None else self.bad.view(len(ids), -1).any(dim=1).tolist()
        if named := [name for name, is_bad in zip(ids, bad, strict=False) if is_bad]:
            raise UserError(
                f"the logits are not finite while summarizing {', '.join(named)}: the weights or "
                "the adapter hold NaN, or --precision fp32 is needed"
            )


def summarize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    generation: GenerationOptions,
    autocast_dtype: torch.dtype | None = None,
    progress: str | None = None,
) -> list[Summary]:
    """One summary for each dialogue, in the order given; beam search by transformers' `generate`.

    Dialogues of similar length share a batch, so there is little padding. With several processes
    each takes its shard of the batches, and all get all summaries. The settings override the
    checkpoint's; the special tokens are those of training. Mode and generation config are restored.

    Args:
        autocast_dtype: the precision; None: that of the weights.
        progress: the title of a bar; None: no bar.

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
        with bar, modes, uncompiled(model), autocast(device, autocast_dtype):
            for chosen in batches:
                batch, finite = collate([encoded[i] for i in chosen], pad), _Finite()
                output = cast(Any, model).generate(  # `generate` computes no gradients
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    past_key_values=_BeamCache(DynamicCache(), DynamicCache()),
                    logits_processor=LogitsProcessorList([finite]),
                    **settings,
                )
                finite.check([encoded[i].id for i in chosen])
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
    """Dropout off, and nothing but `config` from the checkpoint's ways of decoding.

    The mode of each module is restored, even if they were mixed.
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
) -> Evaluation:
    """The base and the fine-tuned model on the same dialogues.

    The base is `model` with its adapter disabled: the same weights in memory, no copy. Full
    fine-tuning overwrites them, so `base_model` is the base read again. Decoding is faster if the
    adapter was merged before.

    Raises:
        UserError: no dialogues, impossible settings, or rouge_score is not installed.
    """
    require_rouge()
    if [example.id for example in examples] != [row.id for row in encoded]:
        raise ValueError("`encoded` is not the encoding of `examples`, in their order")

    def decode(which: PreTrainedModel, title: str) -> list[Summary]:
        bar = title if progress else None
        return summarize(which, tokenizer, encoded, generation, autocast_dtype, bar)

    with minilora.disabled(model) if base_model is None else nullcontext():
        base = decode(base_model or model, "base")
    finetuned = decode(model, "fine-tuned")
    settings = asdict(generation) | {"autocast": str(autocast_dtype) if autocast_dtype else None}
    return compare(base, finetuned, examples, data=data, split=split, generation=settings)
