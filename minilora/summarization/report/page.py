"""report.html: the result of a fine-tune on one page.

Style, script and plots are in the file. Its content security policy forbids everything else, and
every text from a run goes through `escape`.
"""

import base64
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from string import Template
from typing import Any

from minilora.files import write_file

from ..presets import ASSETS
from ..settings import GROUPS
from .page_curves import curves
from .page_dialogues import dialogues
from .page_numbers import before_and_after, cost
from .page_parts import html_table, run_name, tag
from .page_spectra import spectra
from .plots import escape
from .runs import Run, read_report


def write_report(directories: Sequence[Path], path: Path) -> None:
    """Write the page of a run, or of several side by side.

    Raises:
        UserError, LoRAError, OSError: as `read_report`, or the page cannot be written. An older
            page is unchanged then.
    """
    page = render([read_report(directory) for directory in directories])
    write_file(path, page.encode())


def render(runs: Sequence[Run]) -> str:
    """The whole page."""
    sections = [
        ("cost", "What was trained", cost(runs)),
        ("scores", "Before and after", before_and_after(runs)),
        ("curves", "Training", curves(runs)),
        ("dialogues", "Dialogues", dialogues(runs)),
        ("spectra", "The adapter", spectra(runs)),
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


# Header -------------------------------------------------------------------------------------------


def _header(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        names = tag("p", ", ".join(escape(run.name) for run in runs), "lead")
        return f'<p class="kicker">minilora</p><h1>{len(runs)} runs, side by side</h1>{names}'
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
    """A hub name, or the last part of a path."""
    text = str(model)
    return text if text.count("/") <= 1 and not text.startswith((".", "/")) else Path(text).name


def _verdict(run: Run) -> str:
    trained = ""
    if run.start:
        some, total = run.start["trainable"], run.start["total"]
        trained = f"{some:,} of {total:,} parameters trained ({100 * some / total:.2f}%)"
    if run.evaluation is None:
        return f"{trained or 'Not trained yet'}; not scored yet."
    scores, evaluation = run.evaluation.intervals, run.evaluation
    change, low, high = scores["difference"]["rouge1"]
    return (
        f"<strong>ROUGE-1 {scores['base']['rouge1'].mean:.1f} → "
        f"{scores['finetuned']['rouge1'].mean:.1f}</strong> ({change:+.1f}, 95% interval "
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
            f"<strong>Training is not finished</strong>: the log ends at step {step}. Resume with "
            f"<code>python train.py --resume {path}</code>."
        )
    if run.evaluation is None:
        scores = escape(shlex.quote(str(run.path / "evaluation.json")))
        found.append(
            "<strong>Not scored</strong>: there is no evaluation.json. Score it with "
            f"<code>python evaluate.py {path} --output {scores}</code>, then write "
            f"this page again with <code>python -m minilora report {path}</code>."
        )
    return "".join(tag("p", words, "notice") for words in found)


# Configuration ------------------------------------------------------------------------------------


def _configuration(runs: Sequence[Run]) -> str:
    """Every setting by group; with several runs the differences are marked."""
    one = len(runs) == 1
    meanings = {"preset": "a whole configuration, which the flags change"}
    groups = {"model": ["preset"]}
    for kind in GROUPS.values():
        meanings |= {f.name: str(f.metadata.get("help", "")) for f in fields(kind)}
        groups.setdefault(kind._argument_group_name, []).extend(f.name for f in fields(kind))
    groups["other"] = sorted({key for run in runs for key in run.config} - meanings.keys())
    head = ["value", "meaning"] if one else [run_name(r, i) for i, r in enumerate(runs)]
    kind_of_table = "settings explained" if one else "settings"
    parts = []
    for title, names in groups.items():
        body = []
        for name in names:
            if not any(name in run.config for run in runs):
                continue
            values = [_value(run.config.get(name, "–")) for run in runs]
            cells = [f"<code>{escape(value)}</code>" for value in values]
            if len(set(values)) > 1:
                cells = [tag("strong", cell, "differs") for cell in cells]
            meaning = [escape(meanings.get(name, ""))] if one else []
            body.append([escape(name), *cells, *meaning])
        if body:
            table = html_table(title, ["setting", *head], body, kind_of_table)
            parts.append(f"<h3>{escape(title)}</h3>{table}")
    return "".join(parts)


def _value(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
