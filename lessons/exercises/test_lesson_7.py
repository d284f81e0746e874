"""Lesson 7: checked against the library's counts and its bootstrap."""

import pytest
import torch
from torch import nn

import minilora
from minilora.summarization.evaluation.rouge import bootstrap

SHAPES = [(16, 16), (16, 16), (64, 16), (16, 64)]


def test_the_count_is_that_of_inject(work):
    model = nn.Sequential(*(nn.Linear(in_, out) for out, in_ in SHAPES))
    names = tuple(str(i) for i in range(len(SHAPES)))
    report = minilora.inject(model, minilora.LoRAConfig(rank=3, targets=names))
    assert work.trained_numbers(SHAPES, 3) == report.trainable


@pytest.mark.parametrize(("budget", "rank"), [(223, 0), (224, 1), (447, 1), (1000, 4), (10**6, 16)])
def test_the_rank_is_the_largest_that_fits(work, budget, rank):
    assert work.rank_within(SHAPES, budget) == rank


def test_the_interval_is_paired(work):
    hard = 20 * torch.randn(80)  # some dialogues are hard for both
    first, second = hard + 1 + 0.5 * torch.randn(80), hard + 0.5 * torch.randn(80)
    expected = bootstrap((first - second).tolist())
    low, high = work.paired_interval(first, second)
    assert low == pytest.approx(expected.low, abs=0.05)  # drawn from other random numbers
    assert high == pytest.approx(expected.high, abs=0.05)
    assert low > 0.5  # unpaired, the interval is about forty times as wide
