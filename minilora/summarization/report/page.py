"""report.html: a run on one page.

`assets/page/page.html` is its layout; style, script and charts are in the file. Its content
security policy forbids everything else, and every text from a run goes through `escape`.
"""

import base64
import hashlib
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from string import Template

from minilora.files import write_file

from ..errors import counted
from ..evaluation.compare import Evaluation
from ..presets import ASSETS, restored
from ..settings import GROUPS, in_words
from .figures import Table, duration, nonsense_note, nonsense_table, score_table
from .markup import escape, html_table
from .page_charts import curves
from .page_dialogues import cards
from .page_ranks import rank_grid
from .runs import Run, read_report
from .terminal import NONSENSE_TITLE


def write_report(directory: Path, path: Path) -> None:
    """Write the page of a run.

    Raises:
        UserError, OSError: as `read_report`, or the page cannot be written. An older page is
            unchanged then.
    """
    write_file(path.resolve(), render(read_report(directory)).encode())


def render(run: Run) -> str:
    """The whole page."""
    style, script = (_asset(name) for name in ("style.css", "script.js"))
    scored = run.evaluation
    return Template(_asset("page.html")).substitute(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        name=escape(run.path.resolve().name),
        title=escape(_title(run)),
        lead=_lead(run),
        notices=_notices(run),
        cost=_cost(run),
        scores=_scores(scored) if scored else "<p>Not scored yet.</p>",
        curves=curves(run) + rank_grid(run.ranks),
        dialogues=cards(scored.examples) if scored else "<p>Not scored yet.</p>",
        settings=_settings(run),
    )


def _asset(name: str) -> str:
    return (ASSETS / "page" / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


# Header -------------------------------------------------------------------------------------------


def _title(run: Run) -> str:
    model = restored(str(run.config.get("model", "pocket-bart")), run.path)
    return f"{model}, {in_words(run.config)}"


def _lead(run: Run) -> str:
    """The result in one sentence."""
    if run.evaluation is None:
        trained = f"{counted(len(run.steps), 'step')} trained" if run.steps else "Not trained yet"
        return f"{trained}; not scored yet."
    before, after, change = (
        run.evaluation.intervals[side]["rouge1"] for side in ("base", "finetuned", "difference")
    )
    return (
        f"<strong>ROUGE-1 {before.mean:.1f} → {after.mean:.1f}</strong> ({change.mean:+.1f}, 95% "
        f"interval {change.low:+.1f} to {change.high:+.1f}) on "
        f"{counted(run.evaluation.n, 'dialogue')} of "
        f"{escape(run.evaluation.data)}, {escape(run.evaluation.split)} split."
    )


def _notices(run: Run) -> str:
    """Problems of the first steps; missing parts, each with the command that adds it."""
    found = [escape(problem) for problem in run.problems]
    path = escape(shlex.quote(str(run.path)))
    if run.end is None:
        step = run.steps[-1]["step"] if run.steps else 0
        found.append(
            f"Training is not finished: the log ends at step {step:,.0f}. Resume it with "
            f"<code>python -m minilora train --resume {path}</code>"
        )
    if run.evaluation is None:
        found.append(
            "Not scored: there is no evaluation.json. Score it, and write this page again, with "
            f"<code>python -m minilora train --resume {path} --evaluate</code>"
        )
    return "".join(f'<p class="notice">{notice}</p>' for notice in found)


# Sections -----------------------------------------------------------------------------------------


def _cost(run: Run) -> str:
    """Parameters, time and memory: a label, a value and a remark each."""
    facts = []
    if run.start:
        trained, total = run.start["trainable"], run.start["total"]
        share = f"{trained / total:.2%} of {total:,}"
        facts.append(("trained parameters", f"{trained:,}", share))
    count = len({record["epoch"] for record in run.validations})
    epochs = f"in {count} epoch{'s' * (count != 1)}" if count else "the first epoch is not over"
    facts.append(("steps", f"{len(run.steps):,}", epochs))
    if run.end:
        facts.append(("time", duration(run.end["seconds"]), "training and validation"))
        facts.append(("peak memory", f"{run.end['peak_bytes'] / 2**20:,.0f} MiB", ""))
    if (best := run.best) and best["rouge1"] is not None:
        score = f"ROUGE-1 {best['rouge1']:.1f}"
        facts.append(("best validation", f"epoch {best['epoch']:.0f}", score))
    return "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{remark}</small></dd></div>"
        for label, value, remark in facts
    )


def _scores(evaluation: Evaluation) -> str:
    """The terminal's tables, and on how many dialogues the score rose."""
    gains = [example.gain for example in evaluation.examples]
    up, down = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    same = len(gains) - up - down
    rose = f"rose on {counted(up, 'dialogue')}, fell on {down:,} and stayed on {same:,}"
    parts = [
        _numbers("ROUGE and length", score_table(evaluation)),
        f"<p>ROUGE-1 {rose}.</p>",
    ]
    if nonsense := nonsense_table(evaluation):
        parts += [f"<h3>{NONSENSE_TITLE}</h3>", _numbers(NONSENSE_TITLE, nonsense)]
        parts += [f"<p>{note}</p>" for note in nonsense_note(evaluation)]
    return "".join(parts)


def _numbers(label: str, table: Table) -> str:
    """The interval of each figure in small print."""
    head, *rows = table
    cells = [
        [re.sub(r"(\[.*\])", r"<small>\1</small>", cell).replace("rouge", "ROUGE-") for cell in row]
        for row in rows
    ]
    return html_table(label, head, cells)


def _settings(run: Run) -> str:
    """Every setting with its meaning."""
    meanings = {f.name: f.metadata["help"] for group in GROUPS.values() for f in fields(group)}
    rows = []
    for name, value in run.config.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        meaning = escape(meanings.get(name, ""))
        rows.append([escape(name), f"<code>{escape(shown)}</code>", meaning])
    return html_table("settings", ["setting", "value", "meaning"], rows)
