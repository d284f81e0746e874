"""The harness of kills in short; the long one is `python -m tests.faults`."""

import os
from pathlib import Path

import pytest

from tests.faults import CHECKPOINT, VALIDATION, Harness, unreadable


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_anywhere_a_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Inside a checkpoint, while validating, and twice at a random moment."""
    harness = Harness(tmp_path)
    met = []
    for number in (3, 1, 0, 4):
        trial = harness.trial(number)
        assert trial["unreadable"] == trial["left"] == []
        assert trial["adapter"]
        assert trial["log"]
        assert trial["scores"]
        met += trial["killed"]
    assert met[:2] == [CHECKPOINT, VALIDATION]


def test_the_harness_sees_what_is_unreadable(tmp_path: Path) -> None:
    assert unreadable(tmp_path) == []  # nothing there yet
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert len(unreadable(tmp_path)) == 3
