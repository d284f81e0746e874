"""A grid of the ranks that AdaLoRA chose: a row for a kind of module, a column for a layer."""

import re
from collections.abc import Mapping

from .markup import escape

LABELS, WIDTH, ROW = 270, 440, 20  # units of the view box: where the squares begin and end


def rank_grid(ranks: Mapping[str, int]) -> str:
    """An SVG figure, or "" without ranks. Names that differ in their first number share a row.

    Args:
        ranks: dotted name of a module -> rank.
    """
    rows: dict[str, dict[int, int]] = {}
    for name, rank in ranks.items():
        ((start, number, end),) = re.findall(r"(?s)^(\D*)(\d*)(.*)", name)
        rows.setdefault(f"{start.removeprefix('model.')}*{end}", {})[int(number or 0)] = rank
    if not rows:
        return ""
    most = max(1, *ranks.values())
    columns = sorted({column for row in rows.values() for column in row})
    side = (WIDTH - LABELS) / len(columns)
    parts = [_text(LABELS + (i + 0.5) * side, 14, column) for i, column in enumerate(columns)]
    for y, (label, row) in enumerate(sorted(rows.items()), 1):
        shown = f'text-anchor="end">{escape(label)}</text>'
        parts.append(f'<text x="{LABELS - 6}" y="{y * ROW + 14}" {shown}')
        for column, rank in row.items():
            x, shade = LABELS + columns.index(column) * side, 0.6 * rank / most  # below the number
            parts.append(
                f'<rect class="cell c1" x="{x:.1f}" y="{y * ROW}" width="{side - 2:.1f}" '
                f'height="{ROW - 2}" fill-opacity="{shade:.2f}"/>'
            )
            parts.append(_text(x + side / 2 - 1, y * ROW + 14, rank))
    total, title = sum(ranks.values()), "Ranks that training chose"
    lost = sum(rank == 0 for rank in ranks.values())
    mean = f"{total / len(ranks):.3g} on average, {most} at most, none in {lost}"
    return (
        f'<figure><h3>{title}</h3><svg class="plot" role="img" aria-label="{title}, by module" '
        f'viewBox="0 0 {WIDTH} {(len(rows) + 1) * ROW}">{"".join(parts)}</svg>'
        f"<figcaption>{len(ranks)} modules: {mean}. A column is a layer.</figcaption></figure>"
    )


def _text(x: float, y: float, value: int) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{value}</text>'
