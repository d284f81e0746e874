"""Lengths for decoding, from the training references if those of the preset do not fit.

A preset's lengths were measured on its own data. On other data, a minimum that is too high makes
every summary too long; with one that is too low, a weak model stops too early.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..settings import GenerationOptions, spelt


def fit_lengths(
    generation: GenerationOptions, lengths: Sequence[int], typed: Collection[str]
) -> tuple[GenerationOptions, list[str]]:
    """The decoding settings with lengths that fit the references, and a notice of what changed.

    A minimum fits if it is between the 10th and the 25th percentile of the references' lengths, a
    maximum if it is at least the 95th. One that does not fit becomes the 25th or the 99th
    percentile, and the length penalty 1. benchmarks/lengths.py measures this rule: a model that saw
    few examples writes too little.

    Args:
        generation: the preset's settings.
        lengths: of the training references in tokens, with a start token, as `generate` counts.
        typed: names of settings that a flag gave; they do not change.
    """
    lengths = sorted(lengths)
    at = [lengths[int(share * (len(lengths) - 1))] for share in (0.1, 0.25, 0.95, 0.99)]
    p10, p25, p95, p99 = at
    before, fitted = asdict(generation), dict[str, Any]()
    if generation.max_length < p95:
        fitted["max_length"] = p99
    if not p10 - 1 <= generation.min_length <= p25 - 1:  # `min_length` does not count the end token
        most = generation.max_length if "max_length" in typed else max(generation.max_length, p99)
        fitted["min_length"] = min(p25 - 1, most)
    if fitted:
        fitted["length_penalty"] = 1.0
    changed = {n: v for n, v in fitted.items() if n not in typed and v != before[n]}
    if not changed:
        return generation, []
    what = ", ".join(
        f"{spelt(name)} is {v} instead of {before[name]}" for name, v in changed.items()
    )
    says = f"the training summaries have {p10} to {p95} tokens (10th and 95th percentile): {what}"
    return replace(generation, **changed), [says]
