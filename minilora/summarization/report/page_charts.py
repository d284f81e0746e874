"""Loss, learning rate and ROUGE by step, as inline SVG.

Colours are classes of the page's style sheet (`c0`, `c1`, ...), so that one chart works in light,
dark and print. Coordinates are in units of the view box.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .markup import escape
from .runs import Record, Run

Point = tuple[float, float]
T = TypeVar("T")

WIDTH, HEIGHT = 400, 215
LEFT, TOP, RIGHT, BOTTOM = 56, 12, 386, 190  # where the axes end


@dataclass(frozen=True)
class Series:
    """Points in the order of x, drawn as a line; as dots too if they are few."""

    name: str
    points: Sequence[Point]
    style: str
    """A class for the colour, and `faint` for a thin line."""


def curves(run: Run) -> str:
    """The charts of what the log has."""
    loss, rate = (_points(run.steps, key) for key in ("loss", "learning_rate"))
    charts = {
        "Loss, nats per token": [
            Series("training, each step", _thin(loss, 1000), "c0 faint"),
            Series("training, moving mean", _moving_mean(loss, 200), "c1"),
            Series("validation", _points(run.validations, "loss"), "c2"),
        ],
        "Validation ROUGE, F1 × 100": [
            Series("ROUGE-1", _points(run.validations, "rouge1"), "c1"),
            Series("ROUGE-2", _points(run.validations, "rouge2"), "c3"),
            Series("ROUGE-L", _points(run.validations, "rougeL"), "c2"),
        ],
        "Learning rate": [Series("learning rate", _thin(rate, 200), "c1")],
    }
    figures = [line_chart(title, series) for title, series in charts.items()]
    return "".join(figures) or "<p>No step is in the log yet.</p>"


def _points(records: Iterable[Record], key: str) -> list[Point]:
    return [(record["step"], record[key]) for record in records if record[key] is not None]


def _thin(points: Sequence[T], most: int) -> Sequence[T]:
    """Every n-th point, n as small as leaves at most `most`."""
    return points[:: math.ceil(len(points) / most) or 1]


def _moving_mean(points: Sequence[Point], most: int) -> list[Point]:
    """The mean of a fifteenth of the points around a step, for at most `most` steps."""
    size = max(1, len(points) // 15)
    starts = _thin(range(len(points) - size + 1), most)
    windows = (points[start : start + size] for start in starts)
    return [(sum(x for x, _ in w) / size, sum(y for _, y in w) / size) for w in windows if w]


def line_chart(title: str, series: Sequence[Series]) -> str:
    """Lines over the optimizer steps, with axes, ticks and a legend; "" without any point."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs, ys = zip(*(point for one in series for point in one.points), strict=True)
    x_ticks, y_ticks = ticks(0, max(xs)), ticks(min(ys), max(ys))
    parts = [f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>']
    for value in y_ticks:
        y = place(value, y_ticks, BOTTOM, TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x = place(value, x_ticks, LEFT, RIGHT)
        parts.append(f'<text x="{x}" y="{BOTTOM + 17}" text-anchor="middle">{value:,.6g}</text>')
    for one in series:
        places = [
            (place(x, x_ticks, LEFT, RIGHT), place(y, y_ticks, BOTTOM, TOP)) for x, y in one.points
        ]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline class="line {one.style}" points="{path}"/>')
        if len(places) <= 20:
            dot = f'<circle class="dot {one.style}" r="3.2"'
            parts += [f'{dot} cx="{x}" cy="{y}"/>' for x, y in places]
    legend = "".join(f'<li class="{one.style}">{escape(one.name)}</li>' for one in series)
    return (
        f'<figure><h3>{title}</h3><svg class="plot" role="img" aria-label="{title}, by step" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
        f'<figcaption><ul class="legend">{legend}</ul></figcaption></figure>'
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to `high`.

    Example:
        >>> ticks(3, 38)
        [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):  # equal up to rounding
        high = low + 0.1 * (abs(low) if abs(low) > 1e-3 else 1.0)
    least = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(k * power for k in (1, 2, 5, 10, 20) if k * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def place(value: float, axis: Sequence[float], start: float, end: float) -> float:
    """Where a value lies if the first tick of the axis lies at `start`, the last at `end`."""
    share = (value - axis[0]) / (axis[-1] - axis[0])
    return round(start + share * (end - start), 1)
