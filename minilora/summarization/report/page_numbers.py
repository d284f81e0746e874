"""The report in numbers: what was trained, its cost, and the scores before and after."""

from collections.abc import Sequence

from ..evaluation.compare import Evaluation
from ..evaluation.rouge import Interval
from .page_parts import NAMES, html_table, run_name, tag
from .plots import escape
from .runs import Run

# What was trained ---------------------------------------------------------------------------------


def cost(runs: Sequence[Run]) -> str:
    rows = [_facts(run) for run in runs]
    if len(runs) == 1:
        tiles = "".join(
            f"<div><dt>{label}</dt><dd>{value}<small>{more}</small></dd></div>"
            for label, (value, more) in rows[0].items()
        )
        return f'<dl class="tiles">{tiles}</dl>'
    body = [
        [run_name(run, i), *(f"{value} <small>{more}</small>" for value, more in row.values())]
        for i, (run, row) in enumerate(zip(runs, rows, strict=True))
    ]
    notices = []
    for run in runs:
        if run.end is None:
            notices.append(f"{escape(run.name)}: training is not finished.")
        if run.evaluation is None:
            notices.append(f"{escape(run.name)}: not scored, it has no evaluation.json.")
    found = "".join(tag("p", notice, "notice") for notice in notices)
    return found + html_table("What was trained", ["run", *rows[0]], body, "numbers")


def _facts(run: Run) -> dict[str, tuple[str, str]]:
    """Label: (value, a remark)."""
    trained = total = share = "–"
    if run.start:
        some, all_ = run.start["trainable"], run.start["total"]
        trained, total, share = f"{some:,}", f"{all_:,}", f"{100 * some / all_:.2f}%"
    modules = f"in {len(run.spectra)} modules" if run.spectra else ""
    peak = run.end["peak_bytes"] / 2**20 if run.end else 0
    chosen, score = "–", ""
    if best := run.best:
        chosen, score = f"epoch {best['epoch']:.0f}", f"ROUGE-1 {best['rouge1']:.1f}"
    return {
        "trained parameters": (trained, modules),
        "share of the model": (share, f"of {total}" if run.start else ""),
        "time": (_duration(run.seconds), "training and validation" if run.end else "so far"),
        "peak memory": (f"{peak:,.0f} MiB" if peak else "–", ""),
        "steps": (f"{len(run.steps):,}", _epochs(run)),
        "best validation": (chosen, score),
    }


def _epochs(run: Run) -> str:
    count = len(run.validations)
    return f"in {count} epoch{'s' * (count != 1)}" if count else "the first epoch not yet over"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# Before and after ---------------------------------------------------------------------------------


def before_and_after(runs: Sequence[Run]) -> str:
    scored = [(i, run, run.evaluation) for i, run in enumerate(runs) if run.evaluation is not None]
    if not scored:
        return ""
    one = len(runs) == 1
    rows = []
    for metric, label in NAMES.items():
        for i, run, evaluation in scored:
            first = label if one else f"{label} {run_name(run, i)}"
            sides = [evaluation.intervals[side][metric] for side in ("base", "finetuned")]
            change = evaluation.intervals["difference"][metric]
            kind = "up" if change.low > 0 else "down" if change.high < 0 else ""
            difference = _html(change, "+.2f")
            if kind and metric != "gen_len":  # shorter is neither better nor worse
                difference = tag("span", difference, f"clear {kind}")
            rows.append([first, *map(_html, sides), difference])
    head = ["" if one else "measure, run", "base", "fine-tuned", "difference, paired"]
    table = html_table("ROUGE before and after", head, rows, "numbers stacked")
    table += _nonsense(scored, one)
    words = "".join(f"<p>{_counts(run, one)}</p>" for _, run, _ in scored)
    words += (
        "<p>Square brackets hold 95% bootstrap intervals of the means; a difference is bold where "
        "its own excludes 0. Both models find the same dialogues hard, so the paired difference "
        "says more than whether the intervals of the two overlap.</p>"
    )
    return table + tag("div", words, "words")


def _nonsense(scored: Sequence[tuple[int, Run, Evaluation]], one: bool) -> str:
    """Shares of the summaries that say what their dialogues do not."""
    rows = []
    for i, run, evaluation in scored:
        for kind, base in (evaluation.nonsense or {"base": {}})["base"].items():
            sides = [(evaluation.nonsense or {})[s][kind] for s in ("finetuned", "reference")]
            label = kind.replace("_", " ") + ("" if one else f" {run_name(run, i)}")
            rows.append([label, _html(base, ".1f"), *(_html(side, ".1f") for side in sides)])
    if not rows:
        return ""
    title = "Per cent of the summaries with what the dialogue lacks, or with a repeated phrase"
    return html_table(title, ["", "base", "fine-tuned", "reference"], rows, "numbers stacked")


def _html(x: Interval, spec: str = ".2f") -> str:
    return f"{x.mean:{spec}} <small>[{x.low:{spec}}, {x.high:{spec}}]</small>"


def _counts(run: Run, one: bool) -> str:
    assert run.evaluation is not None
    gains = [example.gain for example in run.evaluation.examples]
    up, down = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    who, same = "" if one else f"{escape(run.name)}: ", len(gains) - up - down
    return f"{who}ROUGE-1 rose on {up:,} dialogues, fell on {down:,} and stayed on {same:,}."
