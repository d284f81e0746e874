"""Summaries by beam search, and the base beside the fine-tuned model, decoded alike."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import minilora

from .. import processes
from ..data.batches import Encoded, by_length, collate
from ..data.reading import Example
from ..errors import UserError
from ..model.device import autocast
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
    checkpoint's, except for its special tokens. Mode and generation config are restored.

    Args:
        autocast_dtype: the precision; None: that of the weights.
        progress: the title of a bar; None: no bar.

    Raises:
        UserError: settings that contradict each other or go beyond the model's positions.
    """
    settings = generate_arguments(model, generation)
    batches = processes.shard(by_length(encoded, generation.evaluation_batch_size))
    device, pad = next(model.parameters()).device, cast(int, tokenizer.pad_token_id)

    def write() -> list[tuple[int, str, int]]:
        """Position, text and number of tokens of each summary."""
        found: list[tuple[int, str, int]] = []
        total = sum(map(len, batches))
        bar = tqdm(total=total, desc=progress, unit="dialogue", disable=progress is None)
        with bar, _evaluation_mode(model), uncompiled(model), autocast(device, autocast_dtype):
            for chosen in batches:
                batch = collate([encoded[i] for i in chosen], pad)
                output = cast(Any, model).generate(  # `generate` computes no gradients
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    past_key_values=_BeamCache(DynamicCache(), DynamicCache()),
                    **settings,
                )
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
    positions = getattr(model.config, "max_position_embeddings", None) or options.max_length
    if min(options.beams, options.evaluation_batch_size) < 1:
        raise UserError("--beams and --evaluation-batch-size must be at least 1")
    if not 0 <= options.min_length <= options.max_length <= positions:
        raise UserError(
            f"need 0 <= --min-length <= --max-length <= {positions} (the model's positions), not "
            f"{options.min_length} and {options.max_length}"
        )
    settings: dict[str, Any] = {
        "num_beams": options.beams,
        "min_length": options.min_length,
        "max_length": options.max_length,
        "no_repeat_ngram_size": options.no_repeat_ngram,
        # a checkpoint's own limits on new tokens would override min_length and max_length
        "min_new_tokens": None,
        "max_new_tokens": None,
        "do_sample": False,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "use_cache": True,
    }
    if options.beams > 1:  # greedy search would warn
        settings |= {"length_penalty": options.length_penalty, "early_stopping": True}
    return settings


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; the mode of each module is restored, even if they were mixed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
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
