"""report.html: what a fine-tune did, on one page that needs nothing but a browser.

Everything is in the file: style, script, plots. Its content security policy lets it load nothing
and run only its own script, by hash; every text from a run goes through `escape` besides.
"""

import base64
import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from rouge_score.tokenizers import DefaultTokenizer

from minilora.files import write_file
from minilora.summarization.plots import (
    Point,
    Series,
    escape,
    interval_chart,
    line_chart,
    swatch,
    ticks,
)
from minilora.summarization.presets import ASSETS, GROUPS
from minilora.summarization.runs import Record, Run, Spectrum, read_report

NAMES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "gen_len": "tokens",
}
BASE = "c0"  # the colour of the base; c1 to c8 are those of the runs
SHOWN_AT_ONCE = 10


def write_report(directories: Sequence[Path], path: Path) -> None:
    """Write the page of a run, or of several side by side.

    Raises:
        UserError, LoRAError, OSError: as `read_report`, or the page cannot be written. Then a page
            that was there before is untouched.
    """
    page = render([read_report(directory) for directory in directories])
    write_file(path, page.encode())


def render(runs: Sequence[Run]) -> str:
    """The whole page."""
    sections = [
        ("cost", "What was trained", _cost(runs)),
        ("scores", "Before and after", _scores(runs)),
        ("curves", "Training", _curves(runs)),
        ("dialogues", "Dialogues", _dialogues(runs)),
        ("spectra", "The adapter", _spectra(runs)),
        ("configuration", "Configuration", _configuration(runs)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "".join(
        f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in shown
    )
    style, script = (_asset(name) for name in ("style.css", "script.js"))
    return Template(_asset("page.html")).substitute(
        title=escape(" · ".join(run.name for run in runs)),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        header=_header(runs),
        links=links,
        body=body,
    )


def _asset(name: str) -> str:
    return (ASSETS / "page" / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _colour(position: int) -> str:
    return f"c{position % 8 + 1}"


def _tag(name: str, content: str, kind: str = "") -> str:
    return f'<{name} class="{kind}">{content}</{name}>' if kind else f"<{name}>{content}</{name}>"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls within itself where it is too wide. Cells are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _figure(plot: str, legend: Sequence[tuple[str, str]], words: str) -> str:
    """A plot, what its colours mean (swatch, name), and a sentence on what to see."""
    signs = "".join(f"<li>{sign}{escape(name)}</li>" for sign, name in legend)
    key = f'<ul class="legend">{signs}</ul>' if signs else ""
    return f"<figure>{plot}<figcaption>{key}<p>{words}</p></figcaption></figure>"


def _name(run: Run, position: int) -> str:
    return f'<span class="run">{swatch(_colour(position), dots=True)}{escape(run.name)}</span>'


# Header -------------------------------------------------------------------------------------------


def _header(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        names = ", ".join(escape(run.name) for run in runs)
        return f'<p class="kicker">minilora</p><h1>{len(runs)} runs, side by side</h1>' + _tag(
            "p", names, "lead"
        )
    run = runs[0]
    method, rank = run.config.get("method", "lora"), run.config.get("rank", "?")
    how = {"full": "every parameter fine-tuned", "qlora": f"QLoRA of rank {rank}"}
    model = _short(run.config.get("model", "pocket-bart"))
    title = f"{model}, {how.get(method, f'LoRA of rank {rank}')}"
    return (
        f'<p class="kicker">minilora · {escape(run.name)}</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{_verdict(run)}</p>{_notices(run)}'
    )


def _short(model: Any) -> str:
    """A hub name whole, of a path the end."""
    text = str(model)
    return text if text.count("/") <= 1 and not text.startswith((".", "/")) else Path(text).name


def _verdict(run: Run) -> str:
    trained = ""
    if run.start:
        share = 100 * run.start["trainable"] / run.start["total"]
        trained = (
            f"{run.start['trainable']:,} of {run.start['total']:,} parameters trained "
            f"({share:.2f}%)"
        )
    if run.evaluation is None:
        return f"{trained or 'Not trained yet'}; not scored yet."
    scores, evaluation = run.evaluation.scores, run.evaluation
    change, low, high = scores["difference"]["rouge1"]
    return (
        f"<strong>ROUGE-1 {scores['base']['rouge1'][0]:.1f} → "
        f"{scores['finetuned']['rouge1'][0]:.1f}</strong> ({change:+.1f}, 95% interval "
        f"{low:+.1f} to {high:+.1f}) on {len(evaluation.examples):,} dialogues of "
        f"{escape(_short(evaluation.data))}, {escape(evaluation.split)} split"
        + (f", with {trained}." if trained else ".")
    )


def _notices(run: Run) -> str:
    found = []
    path = escape(shlex.quote(str(run.path)))
    if run.end is None:
        step = f"{run.steps[-1]['step']:,.0f}" if run.steps else "0"
        found.append(
            f"<strong>Training is not finished</strong>: the log ends at step {step}. Go on with "
            f"<code>python train.py --resume {path}</code>."
        )
    if run.evaluation is None:
        scores = escape(shlex.quote(str(run.path / "evaluation.json")))
        found.append(
            "<strong>Not scored</strong>: there is no evaluation.json. Score it with "
            f"<code>python evaluate.py {path} --output {scores}</code>, then write "
            f"this page again with <code>python -m minilora report {path}</code>."
        )
    return "".join(_tag("p", words, "notice") for words in found)


# What was trained ---------------------------------------------------------------------------------


def _cost(runs: Sequence[Run]) -> str:
    rows = [_facts(run) for run in runs]
    if len(runs) == 1:
        tiles = "".join(
            f"<div><dt>{label}</dt><dd>{value}<small>{more}</small></dd></div>"
            for label, (value, more) in rows[0].items()
        )
        return f'<dl class="tiles">{tiles}</dl>'
    body = [
        [_name(run, i), *(f"{value} <small>{more}</small>" for value, more in row.values())]
        for i, (run, row) in enumerate(zip(runs, rows, strict=True))
    ]
    notices = "".join(
        f'<p class="notice">{escape(run.name)}: {what}.</p>'
        for run in runs
        for what, wrong in (
            ("training is not finished", run.end is None),
            ("not scored, it has no evaluation.json", run.evaluation is None),
        )
        if wrong
    )
    return notices + _table("What was trained", ["run", *rows[0]], body, "numbers")


def _facts(run: Run) -> dict[str, tuple[str, str]]:
    """Label: (value, what it stands beside)."""
    trained = total = share = "–"
    if run.start:
        trained, total = f"{run.start['trainable']:,}", f"{run.start['total']:,}"
        share = f"{100 * run.start['trainable'] / run.start['total']:.2f}%"
    modules = f"in {len(run.spectra)} modules" if run.spectra else ""
    peak = run.end["peak_bytes"] / 2**20 if run.end else 0
    best = run.best
    return {
        "trained parameters": (trained, modules),
        "share of the model": (share, f"of {total}" if run.start else ""),
        "time": (_duration(run.seconds), "training and validation" if run.end else "so far"),
        "peak memory": (f"{peak:,.0f} MiB" if peak else "–", ""),
        "steps": (f"{len(run.steps):,}", _epochs(run)),
        "best validation": (
            (f"epoch {best['epoch']:.0f}", f"ROUGE-1 {best['rouge1']:.1f}") if best else ("–", "")
        ),
    }


def _epochs(run: Run) -> str:
    count = len(run.validations)
    return f"in {count} epoch{'s' * (count != 1)}" if count else "the first epoch not yet over"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# Before and after ---------------------------------------------------------------------------------


def _scores(runs: Sequence[Run]) -> str:
    scored = [(i, run, run.evaluation) for i, run in enumerate(runs) if run.evaluation is not None]
    if not scored:
        return ""
    one = len(runs) == 1
    same_base = len({str(e.scores["base"]) for _, _, e in scored}) == 1
    lines: list[tuple[str, str, dict[str, tuple[float, float, float]]]] = []
    for i, run, evaluation in scored:
        if not same_base or i == scored[0][0]:
            of = "base" if same_base else f"base of {run.name}"
            lines.append((of, BASE, evaluation.scores["base"]))
        name = "fine-tuned" if one else run.name
        lines.append((name, _colour(i), evaluation.scores["finetuned"]))
    plot = interval_chart(
        "ROUGE before and after with 95% intervals",
        [
            (NAMES[metric], [(name, colour, row[metric]) for name, colour, row in lines])
            for metric in NAMES
            if metric != "gen_len"
        ],
        "F1 × 100",
    )
    figure = _figure(
        plot,
        [(swatch(colour, dots=True), name) for name, colour, _ in lines],
        "Means with 95% bootstrap intervals. Both models find the same dialogues hard, so the "
        "paired difference in the table says more than whether the bars overlap.",
    )
    rows = []
    for metric, label in NAMES.items():
        for i, run, evaluation in scored:
            first = label if one else f"{label} {_name(run, i)}"
            sides = [evaluation.scores[side][metric] for side in ("base", "finetuned")]
            change = evaluation.scores["difference"][metric]
            kind = "up" if change[1] > 0 else "down" if change[2] < 0 else ""
            difference = _signed(change)
            if kind and metric != "gen_len":  # shorter is neither better nor worse
                difference = _tag("span", difference, f"clear {kind}")
            rows.append([first, *map(_plain, sides), difference])
    table = _table(
        "ROUGE before and after",
        ["" if one else "measure, run", "base", "fine-tuned", "difference, paired"],
        rows,
        "numbers stacked",
    )
    words = "".join(f"<p>{_counts(run, one)}</p>" for _, run, _ in scored)
    words += "<p>Square brackets hold 95% intervals; a difference is bold where it excludes 0.</p>"
    words = _tag("div", words, "words")
    if one:
        return f'<div class="pair">{figure}<div>{table}{words}</div></div>'
    return f'<div class="pair">{figure}<div>{words}</div></div>{table}'


def _plain(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f} <small>[{value[1]:.2f}, {value[2]:.2f}]</small>"


def _signed(value: tuple[float, float, float]) -> str:
    return f"{value[0]:+.2f} <small>[{value[1]:+.2f}, {value[2]:+.2f}]</small>"


def _gain(example: Record) -> float:
    return float(example["rouge1_finetuned"] - example["rouge1_base"])


def _counts(run: Run, one: bool) -> str:
    assert run.evaluation is not None
    gains = [_gain(example) for example in run.evaluation.examples]
    up, down = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    who = "" if one else f"{escape(run.name)}: "
    return (
        f"{who}ROUGE-1 rose on {up:,} dialogues, fell on {down:,} and stayed on "
        f"{len(gains) - up - down:,}."
    )


# Training -----------------------------------------------------------------------------------------


def _smooth(points: Sequence[Point]) -> tuple[int, list[Point]]:
    """How many steps are averaged, and the moving mean at their middle; 200 points at most."""
    size = max(1, len(points) // 15)
    starts = range(0, len(points) - size + 1, len(points) // 200 + 1)
    windows = [points[start : start + size] for start in starts]
    return size, [(sum(x for x, _ in w) / size, sum(y for _, y in w) / size) for w in windows]


def _points(records: Iterable[Record], key: str) -> list[Point]:
    return [(r["step"], r[key]) for r in records if r[key] is not None]


def _curves(runs: Sequence[Run]) -> str:
    one = len(runs) == 1
    loss: list[Series] = []
    legend: list[tuple[str, str]] = []
    for i, run in enumerate(runs):
        steps, colour = _points(run.steps, "loss"), _colour(i)
        validation = _points(run.validations, "loss")
        size, smooth = _smooth(steps)
        of = "" if one else f"{run.name}, "
        if one and size > 1:
            thin = steps[:: len(steps) // 1000 + 1]
            loss.append(Series("each step", thin, BASE, faint=True))
            legend.append((swatch(BASE, faint=True), "training, each step"))
        if smooth:
            loss.append(Series(f"{of}training", smooth, colour))
            mean = f"training, mean of {size} steps" if size > 1 else "training"
            legend.append((swatch(colour), mean if one else run.name))
        if validation:
            hue = "c2" if one else colour
            loss.append(Series(f"{of}validation", validation, hue, line=one, dots=True))
            if one:
                legend.append((swatch(hue, dots=True), "validation"))
    if not loss:
        return "<p>No step is in the log yet.</p>"
    words = "The loss on the validation split tells when more training stops paying."
    if not one:
        words = "Lines: training, smoothed. Dots: validation, at the end of each epoch."
    end = max(point[0] for series in loss for point in series.points)
    x = ticks(0, end)
    plot = line_chart("Loss by step", loss, "optimizer step", "loss, nats per token", x=x)
    figures = [_figure(plot, legend, words)]
    rouge, legend = _rouge_series(runs)
    if rouge:
        which = "ROUGE" if one else "ROUGE-1"
        plot = line_chart(
            f"{which} on the validation split by step", rouge, "optimizer step", "F1 × 100", x=x
        )
        words = f"{which} of summaries written for the validation split, after each epoch."
        figures.append(_figure(plot, legend, words))
    return f'<div class="pair">{"".join(figures)}</div>'


def _rouge_series(runs: Sequence[Run]) -> tuple[list[Series], list[tuple[str, str]]]:
    """Of one run three metrics, of several ROUGE-1."""
    if len(runs) == 1:
        metrics = ("rouge1", "rouge2", "rougeL")
        lines = [
            Series(NAMES[m], _points(runs[0].validations, m), colour, dots=True)
            for m, colour in zip(metrics, ("c1", "c3", "c2"), strict=True)
        ]
    else:
        lines = [
            Series(run.name, _points(run.validations, "rouge1"), _colour(i), dots=True)
            for i, run in enumerate(runs)
        ]
    lines = [series for series in lines if series.points]
    return lines, [(swatch(series.colour), series.name) for series in lines]


# Dialogues ----------------------------------------------------------------------------------------


@cache
def _stem(word: str) -> str:
    tokens: list[str] = _tokenizer().tokenize(word)
    return tokens[0]


@cache
def _tokenizer() -> Any:
    return DefaultTokenizer(use_stemmer=True)


def _words(text: str) -> list[tuple[int, int, str]]:
    """Start, end and stem of every word as rouge_score sees them: a-z and 0-9 only."""
    return [(m.start(), m.end(), _stem(m[0])) for m in re.finditer("[A-Za-z0-9]+", text)]


def shared_words(text: str, other: str) -> list[tuple[int, int]]:
    """Where in `text` the words stand that it shares with `other`, by ROUGE-1's own count.

    A word that is twice in `text` and once in `other` is shared once, its first time. With n words
    shared, ROUGE-1's F1 is 2 n over the words of both.
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


def _dialogues(runs: Sequence[Run]) -> str:
    scored = [(i, run) for i, run in enumerate(runs) if run.evaluation is not None]
    if not scored:
        return ""

    def texts(run: Run) -> list[tuple[str, str]]:
        assert run.evaluation is not None
        return [(e["dialogue"], e["reference"]) for e in run.evaluation.examples]

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
        f'<button type="button" data-sort="{key}" aria-pressed="{str(not i).lower()}">{label}'
        "</button>"
        for i, (key, label) in enumerate(
            {
                "order": "as in the data",
                "gain": "biggest gain",
                "drop": "biggest drop",
                "change": "biggest change",
            }.items()
        )
    )
    choice = ""
    if len(alike) > 1:
        options = "".join(
            f'<option value="{k}">{escape(run.name)}</option>' for k, (_, run) in enumerate(alike)
        )
        choice = f'<label>of <select id="of">{options}</select></label>'
    note = (
        f'<p class="notice">Scored on other dialogues, and so not shown here: '
        f"{', '.join(left_out)}.</p>"
        if left_out
        else ""
    )
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
    position: int, of: int, row: Sequence[Record], runs: Sequence[tuple[int, Run]], one: bool
) -> str:
    """One dialogue: the text, the reference, the base's summary, and each run's."""
    reference = row[0]["reference"]
    spans: dict[tuple[int, int], str] = {}
    for example in row:
        spans |= dict.fromkeys(shared_words(reference, example["base"]), "c0")
    for (i, _), example in reversed(list(zip(runs, row, strict=True))):
        for span in shared_words(reference, example["finetuned"]):
            both = " both" if spans.get(span, "") in ("c0", f"{_colour(i)} both") else ""
            spans[span] = _colour(i) + both
    parts = [_summary("Reference", "", _marked(reference, spans))]
    bases = {example["base"]: example for example in row}
    for text, example in bases.items():
        marks = dict.fromkeys(shared_words(text, reference), "c0")
        label = swatch(BASE, dots=True) + "Base"
        parts.append(_summary(label, f"ROUGE-1 {example['rouge1_base']:.1f}", _marked(text, marks)))
    for (i, run), example in zip(runs, row, strict=True):
        marks = dict.fromkeys(shared_words(example["finetuned"], reference), _colour(i))
        label = swatch(_colour(i), dots=True) + ("Fine-tuned" if one else escape(run.name))
        gain = _gain(example)
        kind = "up" if gain > 0 else "down" if gain < 0 else ""
        score = f"ROUGE-1 {example['rouge1_finetuned']:.1f} " + _tag(
            "span", f"{gain:+.1f}", f"gain {kind}"
        )
        parts.append(_summary(label, score, _marked(example["finetuned"], marks)))
    gains = " ".join(f"{_gain(example):.6f}" for example in row)
    return (
        f'<article class="card" data-order="{position}" data-gain="{gains}">'
        f"<h3><bdi>{escape(row[0]['id'])}</bdi> <small>{position + 1} of {of}</small></h3>"
        f'<div class="chat" tabindex="0" role="region" aria-label="dialogue {position + 1}">'
        f"{_turns(row[0]['dialogue'])}</div>"
        f'<dl class="summaries">{"".join(parts)}</dl></article>'
    )


def _summary(label: str, score: str, text: str) -> str:
    small = _tag("span", score, "score") if score else ""
    return f'<div><dt><span>{label}</span>{small}</dt><dd dir="auto">{text}</dd></div>'


def _turns(dialogue: str) -> str:
    """A paragraph for each line; what stands before a colon near its start is the speaker."""
    lines = []
    for line in dialogue.splitlines() or [""]:
        speaker = re.match(r"[^:\n]{1,40}:(?=\s)", line)
        if speaker:
            rest = line[speaker.end() :]
            lines.append(f'<p dir="auto"><b>{escape(speaker[0])}</b>{escape(rest)}</p>')
        else:
            lines.append(f'<p dir="auto">{escape(line)}</p>')
    return "".join(lines)


# The adapter --------------------------------------------------------------------------------------


def _spectra(runs: Sequence[Run]) -> str:
    parts = []
    for i, run in enumerate(runs):
        head = f"<h3>{_name(run, i)}</h3>" if len(runs) > 1 else ""
        if not run.spectra:
            full = run.config.get("method") == "full"
            words = "Every parameter was trained: no adapter." if full else "No adapter yet."
            parts.append(f"{head}<p>{words}</p>")
        else:
            parts.append(head + _spectra_of(run))
    return "".join(parts)


def _spectra_of(run: Run) -> str:
    """A small plot for each kind of module, a line for each layer."""
    kinds: dict[str, list[Spectrum]] = {}
    for spectrum in run.spectra:
        kinds.setdefault(re.sub(r"\d+", "N", spectrum.module), []).append(spectrum)
    top = max(max(spectrum.values) for spectrum in run.spectra)
    rank = max(len(spectrum.values) for spectrum in run.spectra)
    x = [float(v) for v in (range(1, rank + 1) if 1 < rank <= 8 else ticks(0, rank))]
    y = ticks(0, top or 1, 5)
    prefix = _common_prefix(list(kinds))
    plots = []
    for kind, members in kinds.items():
        members = sorted(members, key=lambda s: [int(n) for n in re.findall(r"\d+", s.module)])
        series = [
            Series(
                spectrum.module,
                [(float(k), value) for k, value in enumerate(spectrum.values, 1)],
                _shade(n, len(members)),
                dots=rank <= 16,
            )
            for n, spectrum in enumerate(members)
        ]
        plot = line_chart(
            f"Singular values of {kind}", series, "index", "σ", width=270, height=190, x=x, y=y
        )
        label = escape(kind.removeprefix(prefix)).replace(".", ".<wbr>")
        plots.append(f'<figure class="small"><h4>{label}</h4>{plot}</figure>')
    rows = [
        [
            escape(s.module),
            f"{s.shape[0]} × {s.shape[1]}",
            str(len(s.values)),
            f"{s.scale:.4g}",
            f"{s.norm:.3g}",
            f"{s.stable_rank:.2f}",
            " ".join(f"{value:.3g}" for value in s.values),
        ]
        for s in run.spectra
    ]
    head = ["module", "out × in", "r", "s", "‖sBA‖", "stable rank", "singular values of sBA"]
    dora = " DoRA normalizes W + sBA by its rows afterwards." if run.dora else ""
    return (
        '<p class="words">The singular values σ of the learned update sBA, largest first: how far '
        "it moves the weight, and along how many directions. A line that is still high at its "
        "last index would have used a higher rank. One line per layer, the first "
        f"{swatch('s0')} to the last {swatch('s5')}; all panels share their axes.{dora}</p>"
        f'<div class="panels">{"".join(plots)}</div>'
        f"<details><summary>All {len(rows)} modules as a table</summary>"
        f"{_table('Singular values of every module', head, rows, 'numbers spectra')}</details>"
    )


def _shade(position: int, of: int) -> str:
    """s0 (the first layer) to s5 (the last)."""
    return f"s{round(5 * position / (of - 1)) if of > 1 else 3}"


def _common_prefix(names: Sequence[str]) -> str:
    """The dotted beginning that all names share."""
    parts = [name.split(".")[:-1] for name in names]
    same = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        same.append(column[0])
    return "".join(f"{part}." for part in same)


# Configuration ------------------------------------------------------------------------------------


def _configuration(runs: Sequence[Run]) -> str:
    """Every setting by group; with several runs those that differ are marked."""
    rows = [("preset", "a whole configuration, which the flags change")]
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    for kind in GROUPS.values():
        rows += [(f.name, str(f.metadata.get("help", ""))) for f in fields(kind)]
        groups.append((kind._argument_group_name, rows))
        rows = []
    known = {name for _, settings in groups for name, _ in settings}
    others = sorted({key for run in runs for key in run.config if key not in known})
    groups.append(("other", [(key, "") for key in others]))
    one = len(runs) == 1
    head = [
        "setting",
        *(["value", "meaning"] if one else [_name(r, i) for i, r in enumerate(runs)]),
    ]
    kind_of_table = "settings explained" if one else "settings"
    tables = []
    for title, settings in groups:
        body = []
        for key, meaning in settings:
            if not any(key in run.config for run in runs):
                continue
            values = [_value(run.config.get(key, "–")) for run in runs]
            cells = [f"<code>{escape(value)}</code>" for value in values]
            if len(set(values)) > 1:
                cells = [_tag("strong", cell, "differs") for cell in cells]
            body.append([escape(key), *cells, *([escape(meaning)] if one else [])])
        if body:
            tables.append(f"<h3>{escape(title)}</h3>" + _table(title, head, body, kind_of_table))
    return "".join(tables)


def _value(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
