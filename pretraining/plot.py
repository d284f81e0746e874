"""Draw the held-out losses of losses.jsonl: docs/pocket-bart-loss.svg.

    python pretraining/plot.py

A further run begins where the step counts from zero again; a dotted line is drawn there. Needs
matplotlib (the extra `plot`).
"""

import itertools
import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
TASKS = {
    "chat": ("chats, infilled", "#1b6ca8"),
    "service": ("service chats", "#c8553d"),
    "narrative": ("chats, retold", "#4c8c4a"),
}


def further_runs(rows: list[dict[str, Any]]) -> list[float]:
    """Million tokens at which a run begins with the weights of the one before."""
    pairs = itertools.pairwise(rows)
    return [before["tokens"] / 1e6 for before, row in pairs if row["step"] < before["step"]]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses by tokens seen, of all runs in one line."""
    plt.rcParams["svg.hashsalt"] = "pocket-bart"  # the same file each time
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    end = rows[-1]["tokens"] / 1e6
    for task, (name, color) in TASKS.items():
        for kind, style in (("right", "-"), ("wrong", "--")):
            x, y = [row["tokens"] / 1e6 for row in rows], [row[f"{task}_{kind}"] for row in rows]
            axes.plot(x, y, style, color=color, lw=1.4)
            if kind == "right":
                axes.annotate(name, (end, y[-1]), (6, -3), textcoords="offset points", color=color)
    highest = max(rows[-1][f"{task}_wrong"] for task in TASKS)
    axes.annotate("the same, another's source", (end, highest), (6, -3), textcoords="offset points")
    for begin in further_runs(rows):
        axes.axvline(begin, color="#999999", lw=0.8, ls=":")
    axes.set(xlabel="million tokens read and written", ylabel="loss, nats per target token")
    axes.set(ylim=(0, 9), xlim=(0, 1.32 * end))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    lines = (HERE / "losses.jsonl").read_text().splitlines()
    plot([json.loads(line) for line in lines], HERE.parent / "docs" / "pocket-bart-loss.svg")
