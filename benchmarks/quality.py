"""Does the speed cost quality? Validation loss against examples, and against time.

    python benchmarks/quality.py [--epochs 2] [--seeds 0 1 2] [--device cuda]

pocket-bart on bookings, rank 8 on q_proj and v_proj of all layers or of the decoder only: minilora,
with and without the encoder's states computed once before (that time counts), and PEFT +
Seq2SeqTrainer as people run it. All have the same start for the same targets and take turns. After
every quarter of an epoch the loss of the validation dialogues is computed in the same way for all.
There are three seeds, which set the start of the adapter, the order of the batches and dropout. If
the speed costs nothing, curves of the same targets are equal over examples. Validation does not
count in the time. The first steps, the warm-up, count in the examples but not in the time.

With matplotlib a plot, quality.svg, is written beside the JSON.
"""

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import WEIGHTS, digest, parser, write_result
from fine_tuning import BUILDERS, CACHED, DTYPES, Setting, fine_tune, with_windows
from turns import contestants, rounds
from workplace import pocket_workplace

from minilora.summarization.presets import LEARNING_RATES
from minilora.summarization.settings import DataOptions

BASE = "minilora"
DEFAULT = [
    *(BASE, CACHED, "minilora, decoder only"),
    *("PEFT + Trainer", "PEFT, decoder only + Trainer"),
]
Curve = list[dict[str, float]]


def curve(start: float, windows: Sequence[Mapping[str, float]], seconds: float = 0.0) -> Curve:
    """Examples, seconds of training (without the first window) and loss, after each window.

    Args:
        start: the loss before the first step.
        windows: as `fine_tune` answers.
        seconds: spent before the first step, in which the encoder's states were computed.
    """
    points = [{"examples": 0.0, "seconds": seconds, "loss": start}]
    for i, window in enumerate(windows):
        last = points[-1]
        points.append(
            {
                "examples": last["examples"] + window["examples"],
                "seconds": last["seconds"] + (window["seconds"] if i else 0.0),
                "loss": window["validation_loss"],
            }
        )
    return points


def measure(seed: int, folder: Path, options: Any) -> tuple[dict[str, Curve], dict[str, Any]]:
    """One seed: a curve for each contestant."""
    data = pocket_workplace(
        folder, options.train, options.validation, options.rank, options.dropout, seed
    )
    per_epoch = math.ceil(data["examples"]["train"] / options.batch_size)
    steps = options.epochs * per_epoch - options.warmup
    number = options.epochs * options.points
    setting = Setting(
        folder=folder,
        windows=(),
        device=options.device,
        precision=options.precision,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        rank=options.rank,
        dropout=options.dropout,
        seed=seed,
        threads=options.threads,
        validate_each_window=True,
    )
    setting = with_windows(setting, steps, number, options.warmup)
    works = {name: (fine_tune, (name, setting)) for name in options.contestants}
    with contestants(works) as started:
        answers = rounds(started, len(setting.windows))
        curves = {
            name: curve(
                started[name].facts["validation_loss"],
                answers[name],
                started[name].facts["cache_seconds"],
            )
            for name in started
        }
    return curves, data


def means(curves: Sequence[Curve]) -> Curve:
    """Over the seeds, point by point."""
    return [
        {key: statistics.mean(point[key] for point in points) for key in points[0]}
        for points in zip(*curves, strict=True)
    ]


def seconds_to(loss: float, points: Curve) -> float | None:
    """The time at which the curve first reaches a loss, linear between its points."""
    for before, after in pairwise(points):
        if after["loss"] <= loss < before["loss"]:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return None


def compare(averages: Mapping[str, Curve], base: str = BASE) -> dict[str, dict[str, float | None]]:
    """Each contestant beside minilora: loss at equal examples, time to an equal loss."""
    ours, result = averages[base], {}
    for name, points in averages.items():
        # both reach it: the higher of the two lowest losses
        target = max(min(p["loss"] for p in points), min(p["loss"] for p in ours))
        mine, theirs = seconds_to(target, ours), seconds_to(target, points)
        gaps = [a["loss"] / b["loss"] - 1 for a, b in zip(ours, points, strict=True)]
        result[name] = {
            "final_loss": points[-1]["loss"],
            "minilora_loss_relative": gaps[-1],
            "largest_gap_at_equal_examples": max(map(abs, gaps)),
            "seconds": points[-1]["seconds"],
            "times_minilora": points[-1]["seconds"] / ours[-1]["seconds"],
            "times_minilora_to_equal_loss": theirs / mine if theirs and mine else None,
        }
    return result


def plot(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Two panels, loss over examples and over seconds: thin lines the seeds, thick their mean."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        mpl.rcParams["svg.hashsalt"] = "minilora"
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for number, (name, seeds) in enumerate(curves.items()):
        for panel, key in zip(panels, ("examples", "seconds"), strict=True):
            for points in seeds:
                values = [p[key] for p in points], [p["loss"] for p in points]
                panel.plot(*values, color=f"C{number}", linewidth=0.6, alpha=0.5)
            average = means(seeds)
            values = [p[key] for p in average], [p["loss"] for p in average]
            panel.plot(*values, color=f"C{number}", linewidth=2, label=name)
    panels[0].set(xlabel="training examples", ylabel="validation loss (nats per token)")
    panels[1].set(xlabel="seconds of training")
    panels[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--epochs", type=int, default=2)
    flags.add_argument("--points", type=int, default=4, help="of the curve, in an epoch")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument(
        "--contestants", nargs="+", default=DEFAULT, choices=BUILDERS, metavar="NAME"
    )
    flags.add_argument("--precision", default="bf16", choices=DTYPES)
    flags.add_argument("--batch-size", type=int, default=8)
    rate = LEARNING_RATES["pocket"]["lora"]
    flags.add_argument("--learning-rate", type=float, default=rate, help="the preset's")
    flags.add_argument("--rank", type=int, default=8)
    flags.add_argument("--dropout", type=float, default=0.05)
    flags.add_argument("--warmup", type=int, default=4, help="steps")
    flags.add_argument("--train", type=int, default=700, help="dialogues")
    flags.add_argument("--validation", type=int, default=100, help="dialogues")
    flags.add_argument("--threads", type=int, default=0, help="of each process; 0: torch's choice")
    options = flags.parse_args()
    if options.small:
        options.seeds, options.epochs, options.points = [0], 1, 2
        options.train, options.validation, options.warmup = 40, 8, 1
    if BASE not in options.contestants:
        flags.error(f"--contestants must have {BASE}: the others are compared with it")
    weights = digest([WEIGHTS])
    curves: dict[str, list[Curve]] = {name: [] for name in options.contestants}
    data: dict[str, Any] = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found, data = measure(seed, Path(folder), options)
        for name, points in found.items():
            curves[name].append(points)
            last = points[-1]
            print(f"seed {seed} {name:32} loss {last['loss']:.4f} after {last['seconds']:.1f} s")
    averages = {name: means(seeds) for name, seeds in curves.items()}
    settings = {
        **{key: value for key, value in vars(options).items() if key != "small"},
        "model": "pocket-bart",
        "data": {"name": DataOptions().data, **data},
    }
    device = "" if options.device == "cpu" else f"_{torch.device(options.device).type}"
    result = {
        "weights": weights,
        "settings": settings,
        "results": compare(averages),
        # beside the run whose encoder is computed once: its `times_minilora` are of that run
        "beside_cached": compare(averages, CACHED) if CACHED in averages else {},
        "curves": curves,
    }
    path = write_result(f"quality{device}", result, options.small)
    plot(curves, path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
