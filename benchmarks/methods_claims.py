"""Claims of papers about the methods, tested on the study by rules that were fixed beforehand.

Losses are those on the test split, in nats per target token. Each method has the rate with the
lowest validation loss. The difference of two methods has two intervals of 95%, and both count, so
the larger one decides at either end:

    seeds         Student's (Student 1908), of the differences seed by seed, which share the order
                  of the batches: with three seeds, the mean -+ 2.48 standard deviations
    dialogues     of the means over the seeds, dialogue by dialogue (the standard error of a ratio;
                  Cochran 1977, equation 6.13)

What is forgotten is compared in the same way, text by text: the mean of the losses on held-out
chats and on held-out prose of the pre-training.

    better        A - B < 0       holds if the whole interval is below 0, does not if it is above
    no worse      A - B < margin  holds if it is below the margin, does not if it is above
    alike         |A - B| < margin; none is better if A - B > -margin
    best rates    of a seed: the vertex of the parabola through the validation losses at its best
                  rate and the two beside it, over the logarithm of the rate; the ratio of two
                  methods' best rates seed by seed, with Student's interval of its logarithm

Otherwise the verdict is "cannot tell". The margin is 0.02 nats, 2% of a token's probability. The
intervals are not corrected for the number of claims.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Interval = tuple[float, float, float]  # the mean, and its bounds
HOLDS, NOT, UNKNOWN = "holds", "does not hold", "cannot tell"
MARGIN = 0.02
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306,
           9: 2.262}  # 97.5% quantiles by degrees of freedom  # fmt: skip
NORMAL = 1.96
QV, FULL, ALL = "LoRA r 8, q/v", "full fine-tuning", "LoRA r 2, all-linear"
PISSA, PLUS, DORA, ADALORA = "PiSSA r 8, q/v", "LoRA+ r 8, q/v", "DoRA r 8, q/v", "AdaLoRA r 8, q/v"
HIGH, RS = "LoRA r 64, q/v", "rsLoRA r 64, q/v"
MLP, PLAIN = "prefix of 16", "prefix of 16, no MLP"


def interval(values: list[float]) -> Interval:
    """The mean with Student's 95% interval; a single value has infinite bounds."""
    mean, n = statistics.mean(values), len(values)
    if n < 2:
        return mean, -math.inf, math.inf
    half = STUDENT[n - 1] * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def by_seed(row: Row, rate: float, key: str = "validation_loss") -> dict[int, float]:
    """One measure of the runs at a rate, by seed."""
    found = {}
    for run in row["runs"]:
        value = run.get(key)
        if run["rate"] == rate and value is not None:
            found[run["seed"]] = mean_loss(value) if isinstance(value, dict) else value
    return found


def mean_loss(sets: dict[str, Row]) -> float:
    """Nats per target token, the mean over sets of texts."""
    return statistics.mean(sum(texts["nats"]) / sum(texts["tokens"]) for texts in sets.values())


def rates(row: Row) -> list[float]:
    """The rates with losses of the largest number of seeds."""
    count = {rate: len(by_seed(row, rate)) for rate in {run["rate"] for run in row["runs"]}}
    return sorted(rate for rate, n in count.items() if n and n == max(count.values()))


def best_rate(row: Row) -> float | None:
    """The rate with the lowest mean validation loss over the seeds."""
    found = {rate: statistics.mean(by_seed(row, rate).values()) for rate in rates(row)}
    return min(found, key=lambda rate: found[rate]) if found else None


def difference(a: Row, b: Row) -> Interval | None:
    """The test loss of A minus that of B, each at its best rate."""
    return apart(a, b, "test")


def forgotten(a: Row, b: Row) -> Interval | None:
    """The loss of A on texts of the pre-training minus that of B, each at its best rate."""
    return apart(a, b, "forgotten")


def apart(a: Row, b: Row, key: str) -> Interval | None:
    """A's mean loss over the sets of texts under a key minus B's, with the larger interval."""
    runs = []
    for row in (a, b):
        known = [run for run in row["runs"] if run["rate"] == best_rate(row) and key in run]
        runs.append({run["seed"]: run[key] for run in known})
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if not seeds:
        return None
    mean, low, high = interval([mean_loss(runs[0][s]) - mean_loss(runs[1][s]) for s in seeds])
    errors = []
    for name, texts in runs[0][seeds[0]].items():
        both = [[run[s][name]["nats"] for s in seeds] for run in runs]
        one, other = (list(map(statistics.mean, zip(*nats, strict=True))) for nats in both)
        change = [x - y for x, y in zip(one, other, strict=True)]  # text by text
        errors.append(ratio_error(change, texts["tokens"]))
    half = NORMAL * math.hypot(*errors) / len(errors)
    return mean, min(low, mean - half), max(high, mean + half)


def ratio_error(sums: list[float], counts: list[int]) -> float:
    """The standard error of sum(sums) / sum(counts) over the pairs."""
    n, ratio = len(sums), sum(sums) / sum(counts)
    rest = sum((x - ratio * t) ** 2 for x, t in zip(sums, counts, strict=True))
    return math.sqrt(n / (n - 1) * rest) / sum(counts) if n > 1 else math.inf


def paired(one: dict[int, float], other: dict[int, float]) -> Interval | None:
    """The differences at the seeds that both have."""
    both = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    return interval(both) if both else None


def best_rates(row: Row) -> dict[int, float]:
    """By seed log2 of the best rate. A seed whose best rate is at an end of them is left out."""
    found, tried = {}, rates(row)
    for seed in {run["seed"] for run in row["runs"]}:
        losses = [by_seed(row, rate).get(seed, math.inf) for rate in tried]
        place = losses.index(min(losses))
        before, at, after = ([math.inf, *losses, math.inf])[place : place + 3]
        if math.isfinite(before + at + after):
            # through (-1, before), (0, at), (1, after); the rates are a factor of two apart
            bend = before - 2 * at + after
            step = (before - after) / (2 * bend) if bend else 0.0
            found[seed] = math.log2(tried[place]) + step
    return found


def ratio(a: Row, b: Row) -> Interval | None:
    """A's best rate divided by B's, with its interval."""
    found = paired(best_rates(a), best_rates(b))
    return found and (2.0 ** found[0], 2.0 ** found[1], 2.0 ** found[2])


def below(found: Interval, bound: float) -> str:
    """The verdict on "the figure is below the bound"."""
    return HOLDS if found[2] < bound else NOT if found[1] >= bound else UNKNOWN


def within(found: Interval, low: float, high: float) -> str:
    """The verdict on "the figure is between the bounds"."""
    if low <= found[1] and found[2] <= high:
        return HOLDS
    return NOT if found[2] < low or found[1] > high else UNKNOWN


def together(verdicts: list[str]) -> str:
    """The verdict on a claim with several parts, all of which must hold."""
    return NOT if NOT in verdicts else UNKNOWN if UNKNOWN in verdicts else HOLDS


def loss(name: str, d: Interval) -> str:
    return f"{name}: {d[0]:+.3f} [{d[1]:+.3f}, {d[2]:+.3f}]"


@dataclass(frozen=True)
class Claim:
    """A claim, its paper, the rows it needs, and the rule: the verdict and its figure."""

    text: str
    paper: str
    names: tuple[str, ...]
    rule: Callable[..., tuple[str, str] | None]

    def verdict(self, rows: dict[str, Row]) -> tuple[str, str]:
        """The verdict with its figure; "not measured" if a row or its runs are missing."""
        if not rows.keys() >= set(self.names):
            return "not measured", ""
        return self.rule(*(rows[name] for name in self.names)) or ("not measured", "")


def better(a: Row, b: Row) -> tuple[str, str] | None:
    d = difference(a, b)
    return d and (below(d, 0), loss("loss", d))


def no_worse(a: Row, b: Row) -> tuple[str, str] | None:
    d = difference(a, b)
    return d and (below(d, MARGIN), loss("loss", d))


def each_between(low: float, high: float) -> Callable[..., tuple[str, str] | None]:
    """Every other method's loss minus the first one's lies between the bounds."""

    def rule(base: Row, *others: Row) -> tuple[str, str] | None:
        found = [(other["name"].split(" ")[0], difference(other, base)) for other in others]
        known = [(name, d) for name, d in found if d is not None]
        if len(known) < len(found):
            return None
        verdicts = [within(d, low, high) for _, d in known]
        return together(verdicts), "; ".join(loss(name, d) for name, d in known)

    return rule


def rate_between(low: float, high: float) -> Callable[..., tuple[str, str] | None]:
    def rule(a: Row, b: Row) -> tuple[str, str] | None:
        found = ratio(a, b)
        if found is None:
            measured = a["runs"] and b["runs"]
            return (UNKNOWN, "the best rate is at an end of those tried") if measured else None
        text = f"ratio of the best rates: {found[0]:.3g} [{found[1]:.3g}, {found[2]:.3g}]"
        return within(found, low, high), text

    return rule


def learns_and_forgets_less(lora: Row, full: Row) -> tuple[str, str] | None:
    learnt, lost = difference(full, lora), forgotten(lora, full)
    if learnt is None or lost is None:
        return None
    text = f"{loss('loss, full - LoRA', learnt)}; {loss('forgotten, LoRA - full', lost)}"
    return together([below(learnt, 0), below(lost, 0)]), text


def moves_ranks(ada: Row, lora: Row) -> tuple[str, str] | None:
    """Better than equal ranks; whether the seeds agree on them is a figure without a verdict."""
    d, best = difference(ada, lora), best_rate(ada)
    found = [run["ranks"] for run in ada["runs"] if run["rate"] == best and "ranks" in run]
    if d is None or len(found) < 2:
        return None
    names = sorted(found[0])
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    lists = [([a[n] for n in names], [b[n] for n in names]) for a, b in pairs]
    agree = [statistics.correlation(a, b) for a, b in lists if len(set(a)) > 1 < len(set(b))]
    text = f"correlation of the ranks of two seeds {min(agree):.2f} at least" if agree else ""
    return below(d, 0), "; ".join([loss("loss", d), text or "all ranks alike"])


def arxiv(name: str, number: str) -> str:
    return f"[{name}](https://arxiv.org/abs/{number})"


HU = arxiv("Hu et al. 2021", "2106.09685")
SCHULMAN = "[Schulman et al. 2025](https://thinkingmachines.ai/blog/lora/)"
TUNED = arxiv("Lee et al. 2026", "2602.04998")
CLAIMS = [
    Claim("LoRA is no worse than full fine-tuning", HU, (QV, FULL), no_worse),
    Claim("LoRA's best rate is about ten times full fine-tuning's (5 to 20), in all layers",
          SCHULMAN, (ALL, FULL), rate_between(5, 20)),
    Claim("LoRA in all layers is better than in attention (q and v), at equal parameters",
          SCHULMAN, (ALL, QV), better),
    Claim("DoRA, PiSSA and LoRA+ tie with LoRA, each at its own rate", TUNED,
          (QV, DORA, PISSA, PLUS), each_between(-MARGIN, MARGIN)),
    Claim("None of DoRA, PiSSA and LoRA+ is better than LoRA, each at its own rate",
          arxiv("He et al. 2026", "2601.22708"), (QV, DORA, PISSA, PLUS),
          each_between(-MARGIN, math.inf)),
    Claim("LoRA learns less and forgets less than full fine-tuning",
          arxiv("Biderman et al. 2024", "2405.09673"), (QV, FULL), learns_and_forgets_less),
    Claim("PiSSA wants a lower rate than LoRA", TUNED, (PISSA, QV), rate_between(0, 1)),
    Claim("rsLoRA is better than LoRA at a high rank", arxiv("Kalajdzievski 2023", "2312.03732"),
          (RS, HIGH), better),
    Claim("LoRA+ is better than LoRA", arxiv("Hayou et al. 2024", "2402.12354"),
          (PLUS, QV), better),
    Claim("AdaLoRA moves ranks to where they are needed: better than LoRA",
          arxiv("Zhang et al. 2023", "2303.10512"), (ADALORA, QV), moves_ranks),
    Claim("A prefix that trains through an MLP is better than one without",
          arxiv("Li and Liang 2021", "2101.00190"), (MLP, PLAIN), better),
]  # fmt: skip
