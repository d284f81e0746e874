"""ROUGE of summaries, and bootstrap intervals of the means."""

import importlib.util
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from ..errors import UserError

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MEASURES = (*METRICS, "gen_len")
"""The measures: ROUGE as F1 x 100, and the length in tokens."""


def rouge_is_installed() -> bool:
    return importlib.util.find_spec("rouge_score") is not None


def require_rouge() -> None:
    """Refuse to score without rouge_score.

    Raises:
        UserError: it is not installed.
    """
    if not rouge_is_installed():
        raise UserError("ROUGE needs the package rouge_score: pip install rouge_score")


# A mark, closing quotes and a space, before the first letter of the next sentence. The full-width
# marks of Chinese and Japanese need no space.
_SENTENCE_END = re.compile(
    r"""([.!?…؟।])["'”’»)\]]*[ ](?=["'“‘«(\[¿¡]*([^\W\d_]))|[。！？]["'”’」』）]*"""
)
_TITLES = {"mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "mt", "capt", "gen", "rev"}
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # e.g, i.e, U.S, J.K: without the last dot


def split_sentences(text: str) -> str:
    """`text` with one sentence a line, as rougeLsum expects; lines of the text stay lines.

    A sentence ends at `.`, `!`, `?` or `…` before a space and a letter that is not lower case,
    but not after titles ("Mr."), initials and dotted abbreviations ("e.g."). rouge_score uses NLTK
    for this, whose sentence model is a download.
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
    if word.lower() in ("a.m", "p.m"):  # "at 5 p.m. Anna comes" is more likely than "5 p.m. Monday"
        return False
    initial = len(word) == 1 and word.isupper()
    return initial or word.lower() in _TITLES or _DOTTED.fullmatch(word) is not None


def tokenizer_for(references: Sequence[str]) -> str:
    """The tokenizer for ROUGE: "rouge_score", or "unicode" for other alphabets.

    rouge_score's own tokenizer, which published scores use, reads only a-z and 0-9. It is used if
    at most one character in a thousand is another letter, such as the é of a name.
    """
    letters = [letter for text in references for letter in text if letter.isalnum()]
    others = sum(not letter.isascii() for letter in letters)
    return "unicode" if 1000 * others > len(letters) else "rouge_score"


def rouge(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> list[dict[str, float]]:
    """ROUGE-1, -2, -L and -Lsum of every prediction: F1 x 100 with stemming (Lin, 2004).

    Each prediction has one reference or several; with several, each measure takes the best. The
    tokenizer is `tokenizer_for` all references. An empty text scores 0.

    Raises:
        UserError: rouge_score is not installed.
    """
    require_rouge()
    from rouge_score.rouge_scorer import RougeScorer  # here: training and decoding do not need it

    several = [[texts] if isinstance(texts, str) else texts for texts in references]
    tokenizer = tokenizer_for([text for texts in several for text in texts])
    split = UnicodeWords() if tokenizer == "unicode" else None
    scorer = RougeScorer(list(METRICS), use_stemmer=True, tokenizer=split)
    scores = [
        scorer.score_multi(list(map(split_sentences, texts)), split_sentences(prediction))
        for prediction, texts in zip(predictions, several, strict=True)
    ]
    return [{metric: 100 * score[metric].fmeasure for metric in METRICS} for score in scores]


# Chinese characters, Japanese kana and Thai letters: these scripts have no spaces between words.
_ALONE = r"\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff"
_ALONE += r"\U00020000-\U0003ffff"


class UnicodeWords:
    """The tokenizer "unicode" for RougeScorer."""

    def tokenize(self, text: str) -> list[str]:
        return [stem for _, stem in words(text, "unicode")]


def words(text: str, tokenizer: str) -> list[tuple[tuple[int, int], str]]:
    """((start, end), stem) of every word.

    For "unicode" a word consists of letters, their marks, and digits of any script; in Chinese,
    Japanese and Thai it is one character. Both tokenizers give the same English words.
    """
    found = _any_script().finditer(text) if tokenizer == "unicode" else _ENGLISH.finditer(text)
    return [(word.span(), _stem(word[0])) for word in found]


_ENGLISH = re.compile("[A-Za-z0-9]+")


@cache
def _any_script() -> re.Pattern[str]:
    codes = map(chr, range(0x300, 0x20000))
    marks = "".join(mark for mark in codes if unicodedata.category(mark)[0] == "M")
    return re.compile(rf"[{_ALONE}][{marks}]*|(?:(?![{_ALONE}_])\w[{marks}]*)+")


@cache
def _stem(word: str) -> str:
    if not word.isascii():
        return unicodedata.normalize("NFKC", word).lower()  # é becomes one code point
    return str(_english().tokenize(word)[0])


@cache
def _english() -> Any:
    require_rouge()
    from rouge_score.tokenizers import DefaultTokenizer  # here: it imports NLTK

    return DefaultTokenizer(use_stemmer=True)


class Interval(NamedTuple):
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

    For the differences of two models, dialogue by dialogue, it is the paired bootstrap (Koehn,
    2004). The same values give the same interval; the global random state stays as it is.

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
