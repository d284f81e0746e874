"""Summarize with and without the fine-tuning, score both with ROUGE, and lay them side by side.

The base and the fine-tuned model decode alike: the same dialogues, the same beam search, the
same length settings. Every score comes with a 95% bootstrap interval, and so does the difference
of the two, paired by dialogue: it is the number to look at, since both models find the same
dialogues hard and the intervals of the two scores alone overlap far too readily.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import minilora
from minilora.files import write_file
from minilora.summarization import distributed
from minilora.summarization.data import Encoded, by_length, collate
from minilora.summarization.model import autocast
from minilora.summarization.presets import GenerationOptions, UserError
from minilora.summarization.reading import Example
from minilora.summarization.speed import uncompiled

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MEASURES = (*METRICS, "gen_len")

# Scores -------------------------------------------------------------------------------------------

# A mark, closing quotes and a space, before the first letter of the next sentence; the full-width
# marks of Chinese and Japanese need no space.
_SENTENCE_END = re.compile(
    r"""([.!?…؟।])["'”’»)\]]*[ ](?=["'“‘«(\[¿¡]*([^\W\d_]))|[。！？]["'”’」』）]*"""
)
_TITLES = {"mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "mt", "capt", "gen", "rev"}
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # e.g, i.e, U.S, J.K: without the last dot


def split_sentences(text: str) -> str:
    """`text` with one sentence a line, as rougeLsum wants it; lines of the text stay lines.

    A sentence ends at `.`, `!`, `?` or `…` before a space and a letter that is not lower case,
    but not after titles ("Mr."), initials and dotted abbreviations ("e.g."). rouge_score would
    ask NLTK, whose sentence model is a download.
    """
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(sentence for line in lines for sentence in _sentences(line))


def _sentences(line: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(line):
        mark, next_letter = end.groups()  # both None at a full-width mark
        word = line[max(start, line.rfind(" ", start, end.start()) + 1) : end.start()]
        if mark and (next_letter.islower() or (mark == "." and _is_abbreviation(word))):
            continue
        yield line[start : end.end()].strip()
        start = end.end()
    if rest := line[start:].strip():
        yield rest


def _is_abbreviation(word: str) -> bool:
    word = word.lstrip("\"'“‘«([")
    if word.lower() in ("a.m", "p.m"):  # "at 5 p.m. Anna comes" is likelier than "5 p.m. Monday"
        return False
    initial = len(word) == 1 and word.isupper()
    return initial or word.lower() in _TITLES or _DOTTED.fullmatch(word) is not None


def rouge(predictions: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """ROUGE-1, -2, -L and -Lsum of every prediction: F1 x 100 with stemming (Lin, 2004).

    rouge_score's tokenizer, with which published scores were computed, knows a-z and 0-9 and no
    other letter: a text in another script scores 0. So does an empty one.
    """
    from rouge_score.rouge_scorer import RougeScorer  # not above: training a step needs no scores

    scorer = RougeScorer(list(METRICS), use_stemmer=True)
    scores = [
        scorer.score(split_sentences(reference), split_sentences(prediction))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return [{metric: 100 * score[metric].fmeasure for metric in METRICS} for score in scores]


@dataclass(frozen=True)
class Interval:
    """A mean over the dialogues, and the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(
    values: Sequence[float], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap of the mean: dialogues are drawn with replacement (Efron, 1979).

    Given each dialogue's difference between two models it is the paired bootstrap (Koehn, 2004).
    The same values give the same interval; the global random state is neither read nor moved.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, 2**20 // len(values))  # resamples drawn at once: 8 MB of indices
    means = [
        sample[torch.randint(len(values), (n, len(values)), generator=generator)].mean(dim=1)
        for n in (min(rows, resamples - done) for done in range(0, resamples, rows))
    ]
    tail = (1 - level) / 2
    bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), bounds).tolist()
    return Interval(sample.mean().item(), low, high)


# Generation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    text: str
    tokens: int
    """As transformers counts gen_len: start and end tokens too, padding not."""


class _BeamCache(EncoderDecoderCache):
    """The beams of a dialogue share its encoder output, so only their own past is reordered.

    The stock cache also copies the cross-attention's keys and values (batch x beams, heads,
    source, head_dim), layer by layer and token by token, onto equal rows: a quarter of the time.
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

    Dialogues of like length share a batch, so that little is padded. With several processes each
    takes its share of the batches, which stay as they are, and all get all summaries.
    `autocast_dtype` is the precision to compute in (None: that of the weights), `progress` the
    title of a bar (None: no bar). The settings go before the checkpoint's, whose special tokens
    stay. The model's mode and its generation config are afterwards what they were.

    Raises:
        UserError: settings that contradict each other or go beyond the model's positions.
    """
    settings = generate_arguments(model, generation)
    batches = distributed.share(by_length(encoded, generation.evaluation_batch_size))
    written = distributed.together(
        lambda: list(_write(model, tokenizer, encoded, batches, settings, autocast_dtype, progress))
    )
    summaries = {i: Summary(text, tokens) for part in written for i, text, tokens in part}
    return [summaries[i] for i in range(len(encoded))]


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    batches: Sequence[Sequence[int]],
    settings: dict[str, Any],
    autocast_dtype: torch.dtype | None,
    progress: str | None,
) -> Iterator[tuple[int, str, int]]:
    """Position, text and number of tokens of each summary, batch by batch."""
    device = next(model.parameters()).device
    pad = cast(int, tokenizer.pad_token_id)
    total = sum(map(len, batches))
    bar = tqdm(total=total, desc=progress, unit="dialogue", disable=progress is None)
    with bar, _evaluation_mode(model), uncompiled(model), autocast(device, autocast_dtype):
        for chosen in batches:
            batch = collate([encoded[i] for i in chosen], pad)
            output = cast(Any, model).generate(  # without gradients: `generate` sees to it
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                past_key_values=_BeamCache(DynamicCache(), DynamicCache()),
                **settings,
            )
            texts = tokenizer.batch_decode(output, skip_special_tokens=True)
            lengths = (output != pad).sum(dim=1).tolist()
            for i, text, tokens in zip(chosen, texts, lengths, strict=True):
                yield i, text.strip(), tokens
            bar.update(len(chosen))


def generate_arguments(model: PreTrainedModel, options: GenerationOptions) -> dict[str, Any]:
    """`generate`'s arguments: what is named here goes before the checkpoint's generation config.

    Raises:
        UserError: settings that contradict each other or go beyond the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or options.max_length
    if min(options.beams, options.evaluation_batch_size) < 1:
        raise UserError("beams and evaluation_batch_size must be at least 1")
    if not 0 <= options.min_length <= options.max_length <= positions:
        raise UserError(
            f"min_length {options.min_length} and max_length {options.max_length} must rise from "
            f"0 to at most {positions}, the positions of the model"
        )
    settings: dict[str, Any] = {
        "num_beams": options.beams,
        "min_length": options.min_length,
        "max_length": options.max_length,
        "no_repeat_ngram_size": options.no_repeat_ngram,
        # a checkpoint's own limits on new tokens would go before min_length and max_length
        "min_new_tokens": None,
        "max_new_tokens": None,
        "do_sample": False,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "use_cache": True,
    }
    if options.beams > 1:  # greedy search warns of them
        settings |= {"length_penalty": options.length_penalty, "early_stopping": True}
    return settings


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; each module's own mode is put back, also where they were mixed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# Comparison ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A dialogue with its reference and both models' summaries."""

    id: str
    dialogue: str
    reference: str
    base: str
    finetuned: str
    rouge1_base: float
    rouge1_finetuned: float


@dataclass(frozen=True)
class Evaluation:
    data: str
    split: str
    generation: dict[str, Any]
    intervals: dict[str, dict[str, Interval]]
    """"base", "finetuned" and "difference" (paired), each with every one of `MEASURES`."""
    examples: list[Compared]
    """In the order of the data."""

    @property
    def n(self) -> int:
        return len(self.examples)

    @property
    def base(self) -> dict[str, float]:
        """Mean of each ROUGE as F1 x 100, and of the length in tokens."""
        return {name: interval.mean for name, interval in self.intervals["base"].items()}

    @property
    def finetuned(self) -> dict[str, float]:
        return {name: interval.mean for name, interval in self.intervals["finetuned"].items()}

    def to_dict(self) -> dict[str, Any]:
        """What evaluation.json holds: intervals [low, high], of differences [mean, low, high]."""
        bounds = {
            side: {name: [interval.low, interval.high] for name, interval in row.items()}
            for side, row in self.intervals.items()
        }
        for name, interval in self.intervals["difference"].items():
            bounds["difference"][name].insert(0, interval.mean)
        return {
            "data": self.data,
            "split": self.split,
            "n": self.n,
            "base": self.base,
            "finetuned": self.finetuned,
            "intervals": bounds,
            "generation": self.generation,
            "examples": [asdict(example) for example in self.examples],
        }


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

    The base is `model` with its adapter disabled: the same weights in memory, no copy. After
    full fine-tuning those are gone, and `base_model` is the base read again. The adapter is used
    as it is: who wants it merged, for speed, merges before.

    Raises:
        UserError: no dialogues, or impossible settings.
    """
    if [example.id for example in examples] != [row.id for row in encoded]:
        raise ValueError("`encoded` is not the encoding of `examples`, in their order")

    def decode(which: PreTrainedModel, title: str) -> list[Summary]:
        bar = title if progress else None
        return summarize(which, tokenizer, encoded, generation, autocast_dtype, bar)

    if base_model is None:
        with minilora.disabled(model):
            base = decode(model, "base")
    else:
        base = decode(base_model, "base")
    finetuned = decode(model, "fine-tuned")
    settings = asdict(generation) | {"autocast": str(autocast_dtype) if autocast_dtype else None}
    return compare(base, finetuned, examples, data=data, split=split, generation=settings)


def compare(
    base: Sequence[Summary],
    finetuned: Sequence[Summary],
    examples: Sequence[Example],
    *,
    data: str = "",
    split: str = "test",
    generation: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score both models' summaries of the same dialogues, all in the order of `examples`.

    Raises:
        UserError: there are no dialogues.
    """
    if not examples:
        raise UserError(f"nothing to evaluate: the {split} split of {data} holds no dialogue")
    before, after = _measure(base, examples), _measure(finetuned, examples)
    change = [{m: b[m] - a[m] for m in MEASURES} for a, b in zip(before, after, strict=True)]
    intervals = {
        side: {m: bootstrap([row[m] for row in rows]) for m in MEASURES}
        for side, rows in (("base", before), ("finetuned", after), ("difference", change))
    }
    compared = [
        Compared(e.id, e.dialogue, e.summary, b.text, f.text, r["rouge1"], s["rouge1"])
        for e, b, f, r, s in zip(examples, base, finetuned, before, after, strict=True)
    ]
    return Evaluation(data, split, dict(generation or {}), intervals, compared)


def _measure(summaries: Sequence[Summary], examples: Sequence[Example]) -> list[dict[str, float]]:
    scores = rouge([s.text for s in summaries], [example.summary for example in examples])
    return [row | {"gen_len": s.tokens} for row, s in zip(scores, summaries, strict=True)]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    # a lone surrogate has no UTF-8; what Python writes for it here happens to be JSON's escape
    write_file(path, text.encode("utf-8", "backslashreplace"))
