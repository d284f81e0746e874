"""Parts of every section of the report: HTML, colours, names."""

from collections.abc import Iterable, Sequence

from .plots import escape, swatch
from .runs import Run

NAMES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "gen_len": "tokens",
}
BASE = "c0"  # the colour of the base; c1 to c8 are those of the runs


def run_colour(position: int) -> str:
    return f"c{position % 8 + 1}"


def tag(name: str, content: str, kind: str = "") -> str:
    return f'<{name} class="{kind}">{content}</{name}>' if kind else f"<{name}>{content}</{name}>"


def html_table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = ""
) -> str:
    """A table that scrolls if it is too wide. Cells are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def html_figure(plot: str, legend: Sequence[tuple[str, str]], words: str) -> str:
    """A plot, its legend (swatch, name), and a sentence about it."""
    signs = "".join(f"<li>{sign}{escape(name)}</li>" for sign, name in legend)
    key = f'<ul class="legend">{signs}</ul>' if signs else ""
    return f"<figure>{plot}<figcaption>{key}<p>{words}</p></figcaption></figure>"


def run_name(run: Run, position: int) -> str:
    return f'<span class="run">{swatch(run_colour(position), dots=True)}{escape(run.name)}</span>'
