"""Lesson 8: checked against rouge_score and by examples."""

import pytest
from rouge_score.rouge_scorer import RougeScorer


@pytest.mark.parametrize(
    ("summary", "reference"),
    [
        ("ann meets bob at the park", "ann and bob meet at the park"),
        ("the the the cat", "the cat and the dog"),
        ("bob", "ann"),
        ("", "ann"),
    ],
)
def test_rouge1_is_that_of_the_well_kept_library(work, summary, reference):
    expected = RougeScorer(["rouge1"]).score(reference, summary)["rouge1"]
    found = work.rouge1(summary, reference)
    assert found == pytest.approx((expected.precision, expected.recall, expected.fmeasure))


def test_the_lead_is_what_was_said_first(work):
    dialogue = "Ann: at 7: ok?\nBob: fine\nAnn: bye"
    assert work.lead(dialogue, 1) == "at 7: ok?"
    assert work.lead(dialogue, 2) == "at 7: ok? fine"
    assert work.lead(dialogue, 9) == "at 7: ok? fine bye"


def test_numbers_that_nobody_said_are_found(work):
    dialogue = "Ann: lend me 30, two of us come at 5:45"
    assert work.invented_numbers("The 2 need 30 by five.", dialogue) == []
    assert work.invented_numbers("Seven need 45 or 300.", dialogue) == ["Seven", "300"]
    assert work.invented_numbers("They often attend.", dialogue) == []
