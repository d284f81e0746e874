"""Prefix and prompt tuning learn: 32 chats by heart, each method at its own rate, in 100 steps.

A prefix reaches at most 1.2 times LoRA's loss, a prompt at most half of its own start. All rates
that were tried are in benchmarks/results/by_heart.json, and the best one of each is taken.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def best() -> dict[str, Any]:
    """The row with the lowest loss of each method."""
    result = json.loads((BENCHMARKS / "results" / "by_heart.json").read_text())
    for method, row in result["best"].items():
        ends = [other["end"] for other in result["rows"] if other["method"] == method]
        assert row in result["rows"]
        assert row["end"] == min(ends)
        assert len(ends) > 1
    assert len({row["steps"] for row in result["rows"]}) == 1
    return result["best"]


def within_the_bounds(found: dict[str, Any]) -> bool:
    lora, prefix, prompt = (found[method] for method in ("lora", "prefix", "prompt"))
    assert lora["end"] < 0.01 * lora["start"]  # LoRA has learnt them
    return prefix["end"] <= 1.2 * lora["end"] and prompt["end"] <= 0.5 * prompt["start"]


def test_the_measured_losses_are_within_the_bounds(best: dict[str, Any]) -> None:
    assert within_the_bounds(best)


@pytest.mark.slow
def test_a_prefix_learns_as_lora_does_and_a_prompt_half(
    best: dict[str, Any], monkeypatch: Any
) -> None:
    """Trained anew. The losses end near zero, where machines differ: within a factor of two."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    learn = importlib.import_module("by_heart").learn
    names = ("method", "rate", "steps", "length", "hidden", "seed")
    found = {method: learn(**{n: row[n] for n in names}) for method, row in best.items()}
    assert within_the_bounds(found)
    for method, row in found.items():
        assert row["start"] == pytest.approx(best[method]["start"], rel=1e-3)
        assert row["end"] == pytest.approx(best[method]["end"], rel=1)
