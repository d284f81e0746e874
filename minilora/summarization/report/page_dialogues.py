"""The dialogues, each with its reference and both summaries, as HTML."""

import re
from collections import Counter
from collections.abc import Sequence

from ..evaluation.compare import Compared
from ..evaluation.rouge import tokenizer_for, words
from .markup import escape


def cards(examples: list[Compared]) -> str:
    """A card for each dialogue; the page's script sorts them by `data-gain`."""
    tokenizer = tokenizer_for([text for example in examples for text in example.references])
    count = len(examples)
    return "".join(_card(i, example, count, tokenizer) for i, example in enumerate(examples))


def _card(position: int, example: Compared, of: int, tokenizer: str) -> str:
    gain = example.gain
    base = _marked(example.base, example.references, tokenizer, "c0")
    tuned = _marked(example.finetuned, example.references, tokenizer, "c1")
    kind = "up" if gain > 0 else "down" if gain < 0 else ""
    change = f'<span class="{kind}">{gain:+.1f}</span>'
    rows = (
        ("Reference", "", escape(example.reference)),
        *(("Or", "", escape(text)) for text in example.more_references),
        ("Base", f"ROUGE-1 {example.rouge1_base:.1f}", base),
        ("Fine-tuned", f"ROUGE-1 {example.rouge1_finetuned:.1f} {change}", tuned),
    )
    summaries = "".join(
        f'<div><dt>{who}<span class="score">{score}</span></dt>'
        f'<dd dir="auto">{text or "<em>(empty)</em>"}</dd></div>'
        for who, score, text in rows
    )
    turns = "".join(f'<p dir="auto">{_turn(line)}</p>' for line in example.dialogue.splitlines())
    return (
        f'<article class="card" data-order="{position}" data-gain="{gain:.6f}">'
        f"<h3><bdi>{escape(example.id)}</bdi> <small>{position + 1} of {of}</small></h3>"
        f'<div class="chat" tabindex="0" role="region" aria-label="dialogue {position + 1}">'
        f'{turns}</div><dl class="summaries">{summaries}</dl></article>'
    )


def _turn(line: str) -> str:
    """A line of a dialogue; the text before a colon near its start is the speaker."""
    speaker = re.match(r"(?:[^:]{1,40}:(?=\s))?", line)
    name = speaker[0] if speaker else ""
    return f"<b>{escape(name)}</b>{escape(line[len(name) :])}"


# Marked words: those that ROUGE-1 counts as shared with the reference -----------------------------


def _marked(text: str, references: Sequence[str], tokenizer: str, kind: str) -> str:
    """Text as HTML; the words that it shares with its best reference by ROUGE-1 are marked."""
    parts, done = [], 0

    def rouge1(reference: str) -> float:
        both = len(words(text, tokenizer)) + len(words(reference, tokenizer))
        return 2 * len(shared_words(text, reference, tokenizer)) / max(both, 1)

    for start, end in shared_words(text, max(references, key=rouge1), tokenizer):
        parts.append(escape(text[done:start]))
        parts.append(f'<mark class="{kind}">{text[start:end]}</mark>')
        done = end
    return "".join([*parts, escape(text[done:])])


def shared_words(text: str, other: str, tokenizer: str) -> list[tuple[int, int]]:
    """The positions in `text` of the words that it shares with `other`, as ROUGE-1 counts them.

    A word that is twice in `text` and once in `other` is shared once, the first time. With n shared
    words, ROUGE-1's F1 is 2 n over the words of both.
    """
    left = Counter(stem for _, stem in words(other, tokenizer))
    found = []
    for position, stem in words(text, tokenizer):
        if left[stem]:
            left[stem] -= 1
            found.append(position)
    return found
