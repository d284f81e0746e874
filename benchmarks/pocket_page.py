"""Write docs/pocket-bart.md and its plot from results/pocket.json and pretraining/losses.jsonl.

    python benchmarks/pocket_page.py

The plot needs matplotlib (the extra `plot`).
"""

import json
from pathlib import Path
from typing import Any

from tables import markdown

ROOT = Path(__file__).parent.parent
TEXT = """\
# pocket-bart, and what LoRA changes

pocket-bart is a BART with 19.5 million parameters. It is pre-trained by
[pretraining/](../pretraining/README.md), comes with the package, and fine-tunes in minutes on a
laptop. Its pre-training data contains nothing of the embedded data sets or of SAMSum, and no
summary in the wording of `bookings` ([the rewording](../pretraining/reword.py) keeps venues, dates
and times, so long names of venues do occur in both).

It is a model for learning and testing. What it can do, by data set:

| data | what | with LoRA |
| --- | --- | --- |
| `bookings` (default) | chats with a service: who wants what, where, when | most are right |
| `minichat` | everyday chats in plain English | readable, the facts often mixed up |
| `minichat-hard` | witty chats that imply more than they say | few are right |

For real use take a large BART ([recipes](recipes.md)). The scores of the default run are in
[benchmarks.md](benchmarks.md), its output in [first-run.md](first-run.md).

## Held-out loss during pre-training

![held-out loss by tokens seen](pocket-bart-loss.svg)

Nats per target token on texts that are not in the training data. A dashed line is the loss when the
model reads the source of *another* example. While it is close to the solid line of its colour, the
model ignores its source. All three losses still fall at 118 million tokens. The figures are in
[losses.jsonl](../pretraining/losses.jsonl).

## Ranks and targets, with the earlier weights

These scores are of the weights before (7.9 million parameters, 33 million tokens) on the data set
that is now `minichat-hard`. They have not been measured again.

{table}

ROUGE is F1 with stemming. In brackets is the 95% bootstrap interval over the {n} test dialogues,
of the mean over the seeds. The gain is over the base, paired by dialogue. All methods are decoded
alike, with the lengths that are best for the *base* on the validation split. Minutes and memory are
those of a training run on one core while the other core had other work; minutes are the steps
alone, at the median time per token. "Names invented" counts the capitalized words within a
summary's sentences that are not in the dialogue.
"""


def cell(interval: list[float]) -> str:
    return f"{interval[0]:.1f} [{interval[1]:.1f}, {interval[2]:.1f}]"


def table(result: dict[str, Any]) -> str:
    head = [["", "parameters", "ROUGE-1", "ROUGE-2", "ROUGE-L", "gain, ROUGE-1", "names invented"]]
    head[0] += ["minutes", "GiB"]
    lead = f"first {3} turns, copied"
    for name, row in {lead: result["lead"], "pocket-bart as it ships": result["base"]}.items():
        scores = [cell(row["intervals"][m]) for m in ("rouge1", "rouge2", "rougeL")]
        invented = row.get("invented_per_summary")
        head.append([name, "", *scores, "", f"{invented[0]:.2f}" if invented else "", "", ""])
    for row in result["rows"]:
        scores = [cell(row["intervals"][m]) for m in ("rouge1", "rouge2", "rougeL")]
        mean = {
            k: sum(row[k]) / len(row[k]) for k in ("minutes", "peak_gib", "invented_per_summary")
        }
        seeds = len(row["seeds"])
        head.append(
            [f"{row['name']} ({seeds} seed{'s' * (seeds > 1)})", f"{row['trainable']:,}", *scores,
             cell(row["gain"]["rouge1"]), f"{mean['invented_per_summary']:.2f}",
             f"{mean['minutes']:.1f}", f"{mean['peak_gib']:.1f}"]
        )  # fmt: skip
    return markdown(head)


def plot(path: Path) -> None:
    from matplotlib import pyplot as plt

    text = (ROOT / "pretraining" / "losses.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    names = {"chat": "chats, infilled", "service": "service chats", "narrative": "chats, retold"}
    for color, (task, name) in zip(("#1b6ca8", "#c8553d", "#4c8c4a"), names.items(), strict=True):
        for kind, style in (("right", "-"), ("wrong", "--")):
            key = f"{task}_{kind}"
            x, y = zip(
                *((row["tokens"] / 1e6, row[key]) for row in rows if key in row), strict=True
            )
            axes.plot(x, y, style, color=color, lw=1.4)
            if kind == "right":
                axes.annotate(
                    name, (x[-1], y[-1]), (6, -3), color=color, textcoords="offset points"
                )
    end = rows[-1]["tokens"] / 1e6
    axes.annotate("the same, another's source", (end, 6.1), (6, -3), textcoords="offset points")
    axes.set(xlabel="million tokens read and written", ylabel="loss, nats per target token")
    axes.set(ylim=(0, 9), xlim=(0, 1.32 * end))
    axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "pocket-bart"  # the same file each time
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "pocket.json").read_text())
    path = ROOT / "docs" / "pocket-bart.md"
    path.write_text(TEXT.format(table=table(result), n=len(result["per_dialogue"]["ids"])))
    plot(path.with_name("pocket-bart-loss.svg"))
    print(path)


if __name__ == "__main__":
    main()
