"""Loss and ROUGE by step."""

from collections.abc import Iterable, Sequence

from .page_parts import BASE, NAMES, html_figure, run_colour
from .plots import Point, Series, line_chart, swatch, ticks
from .runs import Record, Run


def _smooth(points: Sequence[Point]) -> tuple[int, list[Point]]:
    """The window of the moving mean in steps, and the mean at its middle; at most 200 points."""
    size = max(1, len(points) // 15)
    starts = range(0, len(points) - size + 1, len(points) // 200 + 1)
    windows = [points[start : start + size] for start in starts]
    return size, [(sum(x for x, _ in w) / size, sum(y for _, y in w) / size) for w in windows]


def _points(records: Iterable[Record], key: str) -> list[Point]:
    return [(r["step"], r[key]) for r in records if r[key] is not None]


def curves(runs: Sequence[Run]) -> str:
    one = len(runs) == 1
    loss: list[Series] = []
    legend: list[tuple[str, str]] = []
    for i, run in enumerate(runs):
        steps, colour = _points(run.steps, "loss"), run_colour(i)
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
    words = "When the validation loss stops falling, more training does not help."
    if not one:
        words = "Lines: training, smoothed. Dots: validation, at the end of each epoch."
    end = max(point[0] for series in loss for point in series.points)
    x = ticks(0, end)
    plot = line_chart("Loss by step", loss, "optimizer step", "loss, nats per token", x=x)
    figures = [html_figure(plot, legend, words)]
    rouge, legend = _rouge_series(runs)
    if rouge:
        which = "ROUGE" if one else "ROUGE-1"
        title = f"{which} on the validation split by step"
        plot = line_chart(title, rouge, "optimizer step", "F1 × 100", x=x)
        words = f"{which} of summaries written for the validation split, after each epoch."
        figures.append(html_figure(plot, legend, words))
    return f'<div class="pair">{"".join(figures)}</div>'


def _rouge_series(runs: Sequence[Run]) -> tuple[list[Series], list[tuple[str, str]]]:
    """Of one run three metrics, of several ROUGE-1."""
    if len(runs) == 1:
        colours = {"rouge1": "c1", "rouge2": "c3", "rougeL": "c2"}
        shown = [(NAMES[m], runs[0], m, colour) for m, colour in colours.items()]
    else:
        shown = [(run.name, run, "rouge1", run_colour(i)) for i, run in enumerate(runs)]
    series = [Series(n, _points(r.validations, m), c, dots=True) for n, r, m, c in shown]
    lines = [one for one in series if one.points]
    return lines, [(swatch(line.colour), line.name) for line in lines]
