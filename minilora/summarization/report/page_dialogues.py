"""The dialogues, each with its reference and the summaries; shared words are marked."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from ..evaluation.compare import Compared
from ..evaluation.rouge import require_rouge
from .page_parts import BASE, run_colour, tag
from .plots import escape, swatch
from .runs import Run

SHOWN_AT_ONCE = 10
SORTS = (  # key, label, aria-pressed
    *(("order", "as in the data", "true"), ("gain", "biggest gain", "false")),
    *(("drop", "biggest drop", "false"), ("change", "biggest change", "false")),
)


@cache
def _stem(word: str) -> str:
    return str(_tokenizer().tokenize(word)[0])


@cache
def _tokenizer() -> Any:
    require_rouge()
    from rouge_score.tokenizers import DefaultTokenizer  # here: it imports NLTK

    return DefaultTokenizer(use_stemmer=True)


def _words(text: str) -> list[tuple[int, int, str]]:
    """Start, end and stem of every word as rouge_score reads them: a-z and 0-9 only."""
    return [(m.start(), m.end(), _stem(m[0])) for m in re.finditer("[A-Za-z0-9]+", text)]


def shared_words(text: str, other: str) -> list[tuple[int, int]]:
    """The positions in `text` of the words that it shares with `other`, as ROUGE-1 counts them.

    A word that is twice in `text` and once in `other` is shared once, the first time. With n shared
    words, ROUGE-1's F1 is 2 n over the words of both.
    """
    left = Counter(stem for _, _, stem in _words(other))
    found = []
    for start, end, stem in _words(text):
        if left[stem]:
            left[stem] -= 1
            found.append((start, end))
    return found


def _marked(text: str, spans: dict[tuple[int, int], str]) -> str:
    """Text as HTML, the spans marked by their class."""
    parts, done = [], 0
    for (start, end), kind in sorted(spans.items()):
        parts.append(escape(text[done:start]))
        parts.append(f'<mark class="{kind}">{escape(text[start:end])}</mark>')
        done = end
    return "".join([*parts, escape(text[done:])]) or "<em>(empty)</em>"


def dialogues(runs: Sequence[Run]) -> str:
    scored = [(i, run) for i, run in enumerate(runs) if run.evaluation is not None]
    if not scored:
        return ""

    def texts(run: Run) -> list[tuple[str, str]]:
        assert run.evaluation is not None
        return [(e.dialogue, e.reference) for e in run.evaluation.examples]

    alike = [(i, run) for i, run in scored if texts(run) == texts(scored[0][1])]
    left_out = [escape(run.name) for i, run in scored if (i, run) not in alike]
    first = alike[0][1].evaluation
    assert first is not None
    examples = list(zip(*(r.evaluation.examples for _, r in alike if r.evaluation), strict=True))
    cards = "".join(
        _card(position, len(first.examples), row, alike, len(runs) == 1)
        for position, row in enumerate(examples)
    )
    buttons = "".join(
        f'<button type="button" data-sort="{key}" aria-pressed="{pressed}">{label}</button>'
        for key, label, pressed in SORTS
    )
    choice = ""
    if len(alike) > 1:
        options = "".join(
            f'<option value="{k}">{escape(run.name)}</option>' for k, (_, run) in enumerate(alike)
        )
        choice = f'<label>of <select id="of">{options}</select></label>'
    note = ""
    if left_out:
        note = f"Scored on other dialogues, so not shown here: {', '.join(left_out)}."
        note = tag("p", note, "notice")
    tuned = "the fine-tuned model" if len(runs) == 1 else "a run"
    return (
        f'{note}<p class="words">Marked words are those that ROUGE-1 counts as shared with the '
        f"reference (endings stripped, a–z and 0–9 only); in the reference, those that "
        f'<mark class="c0">the base</mark>, <mark class="c1">{tuned}</mark> or '
        '<mark class="c1 both">both</mark> found.</p>'
        f'<div class="controls" id="sort" hidden><span>Sort by</span>'
        f'<div class="buttons">{buttons}</div>{choice}</div>'
        f'<div id="cards" data-shown="{SHOWN_AT_ONCE}">{cards}</div>'
        '<p class="controls" id="more" hidden><button type="button" data-more="10">Show 10 more'
        '</button><button type="button" data-more="all">Show all</button>'
        '<span id="count" role="status"></span></p>'
    )


def _card(
    position: int, of: int, row: Sequence[Compared], runs: Sequence[tuple[int, Run]], one: bool
) -> str:
    """One dialogue: the text, the reference, the base's summary, and each run's."""
    reference = row[0].reference
    spans: dict[tuple[int, int], str] = {}
    for example in row:
        spans |= dict.fromkeys(shared_words(reference, example.base), "c0")
    for (i, _), example in reversed(list(zip(runs, row, strict=True))):
        for span in shared_words(reference, example.finetuned):
            both = " both" if spans.get(span, "") in ("c0", f"{run_colour(i)} both") else ""
            spans[span] = run_colour(i) + both
    parts = [_summary("Reference", "", _marked(reference, spans))]
    bases = {example.base: example for example in row}
    for text, example in bases.items():
        marks = dict.fromkeys(shared_words(text, reference), "c0")
        label = swatch(BASE, dots=True) + "Base"
        parts.append(_summary(label, f"ROUGE-1 {example.rouge1_base:.1f}", _marked(text, marks)))
    for (i, run), example in zip(runs, row, strict=True):
        marks = dict.fromkeys(shared_words(example.finetuned, reference), run_colour(i))
        label = swatch(run_colour(i), dots=True) + ("Fine-tuned" if one else escape(run.name))
        gain = example.gain
        kind = "up" if gain > 0 else "down" if gain < 0 else ""
        change = tag("span", f"{gain:+.1f}", f"gain {kind}")
        score = f"ROUGE-1 {example.rouge1_finetuned:.1f} {change}"
        parts.append(_summary(label, score, _marked(example.finetuned, marks)))
    gains = " ".join(f"{example.gain:.6f}" for example in row)
    return (
        f'<article class="card" data-order="{position}" data-gain="{gains}">'
        f"<h3><bdi>{escape(row[0].id)}</bdi> <small>{position + 1} of {of}</small></h3>"
        f'<div class="chat" tabindex="0" role="region" aria-label="dialogue {position + 1}">'
        f"{_turns(row[0].dialogue)}</div>"
        f'<dl class="summaries">{"".join(parts)}</dl></article>'
    )


def _summary(label: str, score: str, text: str) -> str:
    small = tag("span", score, "score") if score else ""
    return f'<div><dt><span>{label}</span>{small}</dt><dd dir="auto">{text}</dd></div>'


def _turns(dialogue: str) -> str:
    """A paragraph for each line; the text before a colon near its start is the speaker."""
    lines = []
    for line in dialogue.splitlines() or [""]:
        speaker = re.match(r"[^:\n]{1,40}:(?=\s)", line)
        name = speaker[0] if speaker else ""
        bold = tag("b", escape(name)) if name else ""
        lines.append(f'<p dir="auto">{bold}{escape(line[len(name) :])}</p>')
    return "".join(lines)
