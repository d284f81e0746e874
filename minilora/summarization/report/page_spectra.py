"""The singular values of the learned update, module by module."""

import re
from collections.abc import Sequence
from itertools import takewhile

from .page_parts import html_table, run_name
from .plots import Series, escape, line_chart, swatch, ticks
from .runs import Run, Spectrum


def spectra(runs: Sequence[Run]) -> str:
    heads = [f"<h3>{run_name(run, i)}</h3>" if len(runs) > 1 else "" for i, run in enumerate(runs)]
    return "".join(head + _spectra_of(run) for head, run in zip(heads, runs, strict=True))


def _spectra_of(run: Run) -> str:
    """A small plot for each kind of module, a line for each layer."""
    if not run.spectra:
        full = run.config.get("method") == "full"
        return f"<p>{'Every parameter was trained: no adapter.' if full else 'No adapter yet.'}</p>"
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
        series = []
        for n, spectrum in enumerate(members):
            points = [(float(k), value) for k, value in enumerate(spectrum.values, 1)]
            shade = _shade(n, len(members))
            series.append(Series(spectrum.module, points, shade, dots=rank <= 16))
        plot = line_chart(
            f"Singular values of {kind}", series, "index", "σ", width=270, height=190, x=x, y=y
        )
        label = escape(kind.removeprefix(prefix)).replace(".", ".<wbr>")
        plots.append(f'<figure class="small"><h4>{label}</h4>{plot}</figure>')
    rows = []
    for s in run.spectra:
        numbers = [f"{s.scale:.4g}", f"{s.norm:.3g}", f"{s.stable_rank:.2f}"]
        values = " ".join(f"{value:.3g}" for value in s.values)
        shape = [f"{s.shape[0]} × {s.shape[1]}", str(len(s.values))]
        rows.append([escape(s.module), *shape, *numbers, values])
    head = ["module", "out × in", "r", "s", "‖sBA‖", "stable rank", "singular values of sBA"]
    dora = " DoRA normalizes W + sBA by its rows afterwards." if run.dora else ""
    return (
        '<p class="words">The singular values σ of the learned update sBA, largest first: how far '
        "it moves the weight, and along how many directions. A line that is still high at its "
        "last index would have used a higher rank. One line per layer, the first "
        f"{swatch('s0')} to the last {swatch('s5')}; all panels share their axes.{dora}</p>"
        f'<div class="panels">{"".join(plots)}</div>'
        f"<details><summary>All {len(rows)} modules as a table</summary>"
        f"{html_table('Singular values of every module', head, rows, 'numbers spectra')}</details>"
    )


def _shade(position: int, of: int) -> str:
    """s0 (the first layer) to s5 (the last)."""
    return f"s{round(5 * position / (of - 1)) if of > 1 else 3}"


def _common_prefix(names: Sequence[str]) -> str:
    """The dotted beginning that all names share."""
    parts = sorted(name.split(".")[:-1] for name in names)
    pairs = zip(parts[0], parts[-1], strict=False)  # all others lie between these two
    return "".join(f"{one}." for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
