"""Plots as inline SVG: axes, ticks, units.

Colours are classes (`c0`, `c1`, ...) of the page's style sheet, so that one plot works in light,
dark and print. Coordinates are in units of the view box.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


def escape(text: object) -> str:
    """Text as HTML, even within quotes: no markup, control characters or lone surrogates."""
    plain = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text))
    return html.escape(plain, quote=True)


@dataclass(frozen=True)
class Series:
    """Points in the order of x, drawn as a line, as dots, or both."""

    name: str
    points: Sequence[Point]
    colour: str = "c0"
    line: bool = True
    dots: bool = False
    faint: bool = False


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


def number(value: float) -> str:
    """A short form: 1,200, 3.5, 0.02."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


@dataclass(frozen=True)
class Frame:
    """The rectangle of a plot and its two linear axes."""

    width: float
    height: float
    x: list[float]
    y: list[float]
    """The ticks; the axis ends at the first and the last."""
    left: float = 56
    top: float = 12
    right: float = 14
    bottom: float = 40

    def at(self, x: float, y: float) -> Point:
        (x0, x1), (y0, y1) = (self.x[0], self.x[-1]), (self.y[0], self.y[-1])
        across, down = self.width - self.left - self.right, self.height - self.top - self.bottom
        right, below = (x - x0) / (x1 - x0) * across, (y1 - y) / (y1 - y0) * down
        return round(self.left + right, 1), round(self.top + below, 1)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        """Grid lines, tick labels and axis labels."""
        base, middle = self.height - self.bottom, (self.top + self.height - self.bottom) / 2
        parts = []
        for value in self.y:
            _, y = self.at(self.x[0], value)
            parts.append(f'<path class="grid" d="M{self.left} {y}H{self.width - self.right}"/>')
            parts.append(_text(self.left - 6, y + 4, number(value), "end"))
        for value in self.x:
            x, _ = self.at(value, self.y[0])
            parts.append(f'<path class="axis" d="M{x} {base}v4"/>')
            parts.append(_text(x, base + 17, number(value), "middle"))
        parts.append(f'<path class="axis" d="M{self.left} {base}H{self.width - self.right}"/>')
        centre = (self.left + self.width - self.right) / 2
        parts.append(_text(centre, self.height - 5, x_label, "middle", "label"))
        turned = f' transform="rotate(-90 12 {middle})"'
        parts.append(_text(12, middle, y_label, "middle", "label", turned))
        return parts


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    width: float = 400,
    height: float = 250,
    x: list[float] | None = None,
    y: list[float] | None = None,
) -> str:
    """Lines over two linear axes; by default the points choose the ticks `x` and `y`."""
    xs, ys = zip(*(point for one in series for point in one.points), strict=True)
    frame = Frame(width, height, x or ticks(min(xs), max(xs)), y or ticks(min(ys), max(ys)))
    parts = frame.axes(x_label, y_label)
    for one in series:
        places = [frame.at(*point) for point in one.points]
        faint = " faint" if one.faint else ""
        if one.line and len(places) > 1:
            path = " ".join(f"{x},{y}" for x, y in places)
            parts.append(f'<polyline class="line {one.colour}{faint}" points="{path}"/>')
        if one.dots or len(places) == 1:
            for (cx, cy), (px, py) in zip(places, one.points, strict=True):
                said = escape(f"{one.name}: {number(round(py, 4))} at {number(px)}")
                dot = f'<circle class="dot {one.colour}" cx="{cx}" cy="{cy}" r="3.2">'
                parts.append(f"{dot}<title>{said}</title></circle>")
    return _svg(title, width, height, parts)


def swatch(colour: str, faint: bool = False, dots: bool = False) -> str:
    """The mark of a series in a legend."""
    mark = f'<path class="line {colour}{" faint" if faint else ""}" d="M1 6H17"/>'
    if dots:
        mark = f'<circle class="dot {colour}" cx="9" cy="6" r="4"/>'
    return f'<svg class="swatch" viewBox="0 0 18 12" aria-hidden="true">{mark}</svg>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick", more: str = "") -> str:
    return (
        f'<text class="{kind}" x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}"{more}>'
        f"{escape(text)}</text>"
    )


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="plot" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {width:g} {height:g}">{"".join(parts)}</svg>'
    )
