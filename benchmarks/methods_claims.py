"""Claims of papers about the methods, tested on the study by rules that were fixed beforehand.

Every comparison is of validation losses in nats per target token. The difference of two methods is
taken seed by seed, each at its own best rate, so both see the same order of batches. Its interval
is Student's 95% interval (Student 1908): with three seeds, the mean -+ 2.48 standard deviations.

    better        A - B < 0       holds if the whole interval is below 0, does not if it is above
    no worse      A - B < margin  holds if it is below the margin, does not if it is above
    alike         |A - B| < margin
    best rates    a rate may be the best one if the interval of its loss minus the lowest loss
                  reaches 0 or less; the interval of a ratio covers all pairs of such rates

Otherwise the verdict is "cannot tell". The margin is 0.02 nats, 2% of a token's probability.
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
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # 97.5% quantiles by degrees of freedom
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
    """One measure of the runs at a rate, by seed; of a dict, such as "forgotten", the mean."""
    found = {}
    for run in row["runs"]:
        value = run.get(key)
        if run["rate"] == rate and value is not None:
            value = statistics.mean(value.values()) if isinstance(value, dict) else value
            found[run["seed"]] = value
    return found


def rates(row: Row) -> list[float]:
    """The rates with losses of the largest number of seeds."""
    count = {rate: len(by_seed(row, rate)) for rate in {run["rate"] for run in row["runs"]}}
    return sorted(rate for rate, n in count.items() if n and n == max(count.values()))


def best_rate(row: Row) -> float | None:
    """The rate with the lowest mean validation loss over the seeds."""
    found = {rate: statistics.mean(by_seed(row, rate).values()) for rate in rates(row)}
    return min(found, key=lambda rate: found[rate]) if found else None


def difference(a: Row, b: Row, key: str = "validation_loss") -> Interval | None:
    """A - B, each at its best rate, seed by seed."""
    at = best_rate(a), best_rate(b)
    if at[0] is None or at[1] is None:
        return None
    return paired(by_seed(a, at[0], key), by_seed(b, at[1], key))


def paired(one: dict[int, float], other: dict[int, float]) -> Interval | None:
    """The differences at the seeds that both have."""
    both = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    return interval(both) if both else None


def perhaps_best(row: Row) -> list[float]:
    """The rates that may be the best one, given the spread over the seeds."""
    best, found = best_rate(row), []
    for rate in rates(row):
        apart = paired(by_seed(row, rate), by_seed(row, best)) if best is not None else None
        if rate == best or (apart is not None and apart[1] <= 0):
            found.append(rate)
    return found


def ratio(a: Row, b: Row) -> Interval | None:
    """A's best rate divided by B's, with the lowest and the highest possible value."""
    of_a, of_b, best_a, best_b = perhaps_best(a), perhaps_best(b), best_rate(a), best_rate(b)
    if best_a is None or best_b is None:
        return None
    return best_a / best_b, of_a[0] / of_b[-1], of_a[-1] / of_b[0]


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


def alike(base: Row, *others: Row) -> tuple[str, str] | None:
    found = [(other["name"].split(" ")[0], difference(other, base)) for other in others]
    known = [(name, d) for name, d in found if d is not None]
    if len(known) < len(found):
        return None
    verdicts = [within(d, -MARGIN, MARGIN) for _, d in known]
    return together(verdicts), "; ".join(loss(name, d) for name, d in known)


def rate_between(low: float, high: float) -> Callable[..., tuple[str, str] | None]:
    def rule(a: Row, b: Row) -> tuple[str, str] | None:
        found = ratio(a, b)
        text = found and f"ratio of the best rates: {found[0]:.3g} [{found[1]:.3g}, {found[2]:.3g}]"
        return found and (within(found, low, high), text or "")

    return rule


def lower_rate(a: Row, b: Row) -> tuple[str, str] | None:
    found = ratio(a, b)
    text = found and f"ratio of the best rates: {found[0]:.3g} [{found[1]:.3g}, {found[2]:.3g}]"
    return found and (below(found, 1), text or "")


def learns_and_forgets_less(lora: Row, full: Row) -> tuple[str, str] | None:
    learnt, forgotten = difference(full, lora), difference(lora, full, "forgotten")
    if learnt is None or forgotten is None:
        return None
    text = f"{loss('loss, full - LoRA', learnt)}; {loss('forgotten, LoRA - full', forgotten)}"
    return together([below(learnt, 0), below(forgotten, 0)]), text


def moves_ranks(ada: Row, lora: Row) -> tuple[str, str] | None:
    """Better than equal ranks, and the seeds agree where ranks are needed."""
    d, best = difference(ada, lora), best_rate(ada)
    found = [run["ranks"] for run in ada["runs"] if run["rate"] == best and "ranks" in run]
    if d is None or len(found) < 2:
        return None
    names = sorted(found[0])
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    lists = [([a[n] for n in names], [b[n] for n in names]) for a, b in pairs]
    agree = [statistics.correlation(a, b) for a, b in lists if len(set(a)) > 1 < len(set(b))]
    text = f"correlation of the ranks of two seeds {min(agree):.2f} at least" if agree else ""
    same = HOLDS if agree and min(agree) > 0.5 else NOT
    return together([below(d, 0), same]), "; ".join([loss("loss", d), text or "all ranks alike"])


HU, SCHULMAN = "Hu et al. 2021", "Schulman 2025"
CLAIMS = [
    Claim("LoRA is no worse than full fine-tuning", HU, (QV, FULL), no_worse),
    Claim("LoRA's best rate is about ten times full fine-tuning's (5 to 20)", SCHULMAN,
          (QV, FULL), rate_between(5, 20)),
    Claim("LoRA in all layers is better than in attention, at equal parameters", SCHULMAN,
          (ALL, QV), better),
    Claim("DoRA, PiSSA and LoRA+ tie with LoRA, each at its own rate",
          "arXiv 2602.04998, 2601.22708", (QV, DORA, PISSA, PLUS), alike),
    Claim("LoRA learns less and forgets less than full fine-tuning", "Biderman et al. 2024",
          (QV, FULL), learns_and_forgets_less),
    Claim("PiSSA wants a lower rate than LoRA", "arXiv 2602.04998", (PISSA, QV), lower_rate),
    Claim("rsLoRA is better than LoRA at a high rank", "Kalajdzievski 2023", (RS, HIGH), better),
    Claim("LoRA+ is better than LoRA", "Hayou et al. 2024", (PLUS, QV), better),
    Claim("AdaLoRA moves ranks to where they are needed: better than LoRA, and seeds agree on them",
          "Zhang et al. 2023", (ADALORA, QV), moves_ranks),
    Claim("A prefix that trains through an MLP is better than one without", "Li and Liang 2021",
          (MLP, PLAIN), better),
]  # fmt: skip
