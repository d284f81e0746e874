"""Write docs/methods.md, its plots and five lines of README.md from results/methods.json.

    python benchmarks/methods_page.py            write them
    python benchmarks/methods_page.py --check    exit code 1 if the pages and the result differ

Without a result of all steps there is no such page, and README says nothing of the study. Both say
so if pocket-bart has had other weights since. The plots need matplotlib (the extra `plot`).
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from common import WEIGHTS, digest
from methods_claims import (
    CLAIMS,
    HOLDS,
    NOT,
    UNKNOWN,
    Row,
    best_rate,
    by_seed,
    interval,
    mean_loss,
    rates,
)
from tables import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "methods.json"
BLOCK = re.compile(r"(<!-- study -->).*?(<!-- end -->)", re.DOTALL)
COLORS = ("#1b6ca8", "#222222", "#c8553d", "#4c8c4a", "#8a5fa8", "#c99a2e", "#2fa3a0", "#b0447c",
          "#7a7a7a", "#6a4a3a", "#5a7ad0", "#a0b030", "#e07a9a")  # fmt: skip
TEXT = """\
# Which method is worth it

Every method fine-tunes {model} ({weights}) on {data}: {steps} steps of 8 dialogues, one thread
for each run, {hours:g} hours of a core in all. Each has its own learning rate. The search tries at
least five, a factor of two apart, with one seed and {search_steps} steps. All steps with the seeds
{seeds} follow at the best of them and at its neighbours, and further ones while the best is at an
end. The best of these by the mean validation loss is in the table. The weights are those after the
last step. There is no dropout, alpha is 32, AdamW has no weight decay, and gradients are clipped at
norm 1. Written by `benchmarks/methods_page.py` from
[methods.json](../benchmarks/results/methods.json), measured by `benchmarks/methods.py`.

A small model and {count} test dialogues show what holds here. They do not show what holds for large
models.

## The methods

{table}

In brackets are intervals of 95%: of a loss over the seeds (Student), of ROUGE-1 over the test
dialogues (bootstrap of the mean over the seeds). The summaries are greedy. "Forgotten" is how much
the loss on held-out texts of the pre-training rose: chats and prose, infilled as in the
pre-training. "Stored" counts the numbers in the adapter's files. A prefix trains through an MLP
that is not stored; AdaLoRA's files hold the ranks that training took as well, PiSSA's the rank 2r.
Memory is the peak of the whole process. With a star: the best of the rates that all seeds tried is
the lowest or the highest of them, and a better one may lie beyond.

## Loss over the learning rate

![validation loss by learning rate](methods-rates.svg)

A line is the mean over the seeds, a band reaches from the lowest to the highest seed. Dots are the
search, with a third of the steps.

## Learning against forgetting

![forgetting by validation loss](methods-forgetting.svg)

A dot is one run. To the left is what has learnt more, below what has forgotten less.

## Claims

{claims}

The rules were stated before the study: [methods_claims.py](../benchmarks/methods_claims.py). They
compare losses on the test dialogues in nats per target token, each method at its own best rate.
Best rates are those of the validation losses. A verdict other than "cannot tell" needs the whole
interval of 95% on one side. The intervals are not corrected for the number of claims.

{left}
"""


def cell(found: tuple[float, float, float], digits: int) -> str:
    """A mean with its interval, if it has one."""
    mean, low, high = (f"{value:.{digits}f}" for value in found)
    return f"{mean} [{low}, {high}]" if math.isfinite(found[1]) else mean


def rouge1(runs: list[Row]) -> tuple[float, float, float]:
    """The mean over seeds and dialogues, and the bootstrap's interval over the dialogues."""
    from minilora.summarization.evaluation.rouge import bootstrap

    each = zip(*(run["scores"]["rouge1"] for run in runs), strict=True)
    found = bootstrap([statistics.mean(scores) for scores in each])
    return found.mean, found.low, found.high


def table(result: Row) -> str:
    """One row a method at its own best rate."""
    head = ["", "trained", "stored", "rates tried", "best rate", "seeds", "validation loss"]
    rows = [[*head, "test loss", "ROUGE-1", "forgotten", "minutes", "GiB"]]
    base = result["base"]
    lost = mean_loss(base["forgotten"]) if "forgotten" in base else None
    scores = cell(rouge1([base]), 1)
    losses = [f"{base['validation_loss']:.3f}", f"{mean_loss(base['test']):.3f}"]
    rows.append(["base", "", "", "", "", "", *losses, scores, "", "", ""])
    for row in result["methods"]:
        rate = best_rate(row)
        if rate is None:
            continue
        runs = [r for r in row["runs"] if r["rate"] == rate and r["validation_loss"] is not None]
        figures = [f"{runs[0]['trainable']:,}", f"{runs[0]['stored']:,}"]
        tried = [one["rate"] for one in row["search"]]
        end = "*" * (rate in (min(rates(row)), max(rates(row))))
        figures += [f"{len(tried)}, {min(tried):g} to {max(tried):g}", f"{rate:g}{end}"]
        figures.append(str(len(runs)))
        losses = [list(by_seed(row, rate).values()), [mean_loss(run["test"]) for run in runs]]
        figures += [*(cell(interval(one), 3) for one in losses), cell(rouge1(runs), 1)]
        forgotten = by_seed(row, rate, "forgotten").values()
        known = lost is not None and forgotten
        figures.append(cell(interval([f - lost for f in forgotten]), 3) if known else "")
        figures.append(f"{statistics.mean(run['minutes'] for run in runs):.1f}")
        figures.append(f"{statistics.mean(run['peak_gib'] for run in runs):.2f}")
        rows.append([row["name"], *figures])
    return markdown(rows)


def left_out(result: Row) -> str:
    """The part of the plan that was not run."""
    if not result["left_out"]:
        return "Every run of the plan was made."
    jobs = [(j["method"], f"{j['rate']:g}", j["seed"], j["search"]) for j in result["left_out"]]
    lines = [f"- {m}, rate {r}, seed {s}{' (search)' * search}" for m, r, s, search in jobs]
    names = [row["name"] for row in result["methods"] if not row["runs"]]
    lines += [f"- {name}: all runs of all steps" for name in names]
    return "\n".join(["## Left out", "", *lines])


def page(result: Row) -> str:
    """docs/methods.md."""
    by_name = {row["name"]: row for row in result["methods"]}
    claims = [["claim", "paper", "here", "figure"]]
    claims += [[claim.text, claim.paper, *claim.verdict(by_name)] for claim in CLAIMS]
    return TEXT.format(
        model=model(result), weights=f"SHA-256 {result['weights'][:16]}...",
        data=result["data"], hours=result["core_hours"],
        steps=result["steps"], search_steps=result["search_steps"],
        seeds=", ".join(map(str, result["seeds"])), table=table(result),
        count=len(result["base"]["scores"]["rouge1"]), claims=markdown(claims),
        left=left_out(result),
    ).rstrip() + "\n"  # fmt: skip


def model(result: Row) -> str:
    """Whose figures these are."""
    earlier = result["weights"] != digest([WEIGHTS])
    return "earlier weights of pocket-bart" if earlier else "pocket-bart"


def block(result: Row) -> str:
    """README's five lines."""
    rows = {row["name"]: best_rate(row) for row in result["methods"]}
    by_name = {row["name"]: row for row in result["methods"]}
    losses = {
        name: statistics.mean(by_seed(by_name[name], rate).values())
        for name, rate in rows.items() if rate is not None
    }  # fmt: skip
    best = sorted(losses, key=lambda name: losses[name])[:3]
    said = [claim.verdict(by_name)[0] for claim in CLAIMS]
    holds, fails, open_ = (said.count(v) for v in (HOLDS, NOT, UNKNOWN))
    names = "; ".join(f"{name} {losses[name]:.3f}" for name in best)
    return (
        f"\n\n{len(losses)} methods, each with its own learning rate and {len(result['seeds'])} "
        f"seeds, on {result['data']} with {model(result)}.\n"
        f"The lowest validation losses: {names}\n"
        f"(without training: {result['base']['validation_loss']:.3f}).\n"
        f"Claims of papers that hold here: {holds}, that do not: {fails}, undecided: {open_}.\n"
        "What each learns and forgets, and at which rate: [the study](docs/methods.md)."
    )


def rate_plot(axes: Any, row: Row, color: str) -> None:
    """The search as dots; the seeds as a line with a band."""
    tried = [(one["rate"], one["loss"]) for one in row["search"] if one["loss"] is not None]
    axes.plot(*zip(*tried, strict=True), "o", ms=2.5, color=color, alpha=0.5)
    losses = {rate: list(by_seed(row, rate).values()) for rate in rates(row)}
    means = [statistics.mean(values) for values in losses.values()]
    axes.plot(list(losses), means, "-", color=color, lw=1.6)
    low, high = map(min, losses.values()), map(max, losses.values())
    axes.fill_between(list(losses), list(low), list(high), color=color, alpha=0.2, lw=0)


def plots(result: Row, folder: Path) -> None:
    """methods-rates.svg and methods-forgetting.svg."""
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "methods"  # the same file each time
    shown = [row for row in result["methods"] if rates(row)]
    base = result["base"]["validation_loss"]
    columns, lines = 4, -(-len(shown) // 4)
    figure, grid = plt.subplots(
        lines, columns, figsize=(9, 2.1 * lines), layout="constrained", sharey=True, squeeze=False
    )
    for axes, row, color in zip(grid.flat, shown, COLORS, strict=False):
        rate_plot(axes, row, color)
        axes.axhline(base, color="#999999", lw=0.8, ls=":")
        axes.set_xscale("log")
        axes.set_title(row["name"], fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    lowest = min(statistics.mean(by_seed(r, rate).values()) for r in shown for rate in rates(r))
    grid[0, 0].set_ylim(lowest - 0.05 * (base - lowest), base + 0.1 * (base - lowest))
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("validation loss, nats per target token", fontsize=9)
    figure.savefig(folder / "methods-rates.svg", metadata={"Date": None})
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for row, color in zip(shown, COLORS, strict=False):
        dots = [
            (loss, by_seed(row, rate, "forgotten").get(seed))
            for rate in rates(row) for seed, loss in by_seed(row, rate).items()
        ]  # fmt: skip
        dots = [dot for dot in dots if dot[1] is not None]
        if dots:
            axes.plot(*zip(*dots, strict=True), "o", ms=4, color=color, label=row["name"])
    if "forgotten" in result["base"]:
        axes.axhline(mean_loss(result["base"]["forgotten"]), color="#999999", ls=":")
    axes.set(xlabel="validation loss", ylabel="loss on texts of the pre-training")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(folder / "methods-forgetting.svg", metadata={"Date": None})


def main(root: Path = ROOT, result: Path = RESULT, check: bool = "--check" in sys.argv) -> int:
    docs, readme = root / "docs" / "methods.md", root / "README.md"
    found = json.loads(result.read_text()) if result.exists() else None
    if found and not any(row["runs"] for row in found["methods"]):  # so far only a search
        found = None
    text = readme.read_text(encoding="utf-8")
    said = block(found) if found else ""
    wanted = {readme: BLOCK.sub(lambda part: part[1] + said + part[2], text)}
    wanted |= {docs: page(found) if found else None}
    now = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in wanted}
    stale = [path.name for path in wanted if wanted[path] != now[path]]
    if check:
        for name in stale:
            print(f"{name} and {result.name} differ: run `python benchmarks/methods_page.py`")
        return int(bool(stale))
    for path, content in wanted.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(content, encoding="utf-8")
    if found:
        plots(found, docs.parent)
    print(docs if found else f"{result} has no run of all steps: go on with benchmarks/methods.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
