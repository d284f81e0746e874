"""The embedded data: no chat in two splits, and of bookings nothing said that the chat does not."""

import json

import pytest

from minilora.summarization.evaluation.nonsense import (
    foreign_names,
    foreign_numbers,
    non_words,
    repeats,
)
from minilora.summarization.presets import ASSETS
from tests.marks import slow_but

SPLITS = ("train", "validation", "test")
SIZES = {
    "bookings": (1200, 150, 200),
    "minichat": (1720, 182, 238),
    "minichat-hard": (700, 100, 100),
}


def rows(name: str, split: str) -> list[dict[str, str]]:
    text = (ASSETS / name / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", SIZES)
def test_every_split_is_whole_and_apart(name: str) -> None:
    found = [row for split in SPLITS for row in rows(name, split)]
    assert tuple(len(rows(name, split)) for split in SPLITS) == SIZES[name]
    for field in ("id", "dialogue", "summary"):
        assert len({row[field] for row in found}) == len(found), field
        assert all(row[field] and row[field] == row[field].strip() for row in found)
    assert (ASSETS / name / "LICENSE").is_file()


def test_minichat_has_narratives() -> None:
    """Two to four sentences beside the one of the summary."""
    for row in (row for split in SPLITS for row in rows("minichat", split)):
        assert len(row["narrative"].split()) > 15


def test_minichat_and_minichat_hard_share_no_chat() -> None:
    easy, hard = (
        {row["dialogue"] for split in SPLITS for row in rows(name, split)}
        for name in ("minichat", "minichat-hard")
    )
    assert not easy & hard


def test_bookings_parts_no_conversation() -> None:
    """An id is a conversation's and a part's; parts of one chat would be alike in two splits."""
    found = [row["id"].rsplit("-", 1)[0] for split in SPLITS for row in rows("bookings", split)]
    assert len(set(found)) == len(found) == 1550


@pytest.mark.parametrize("split", slow_but(["validation", "test"], SPLITS))
def test_what_bookings_summaries_say_is_in_the_chat(split: str) -> None:
    """By rule made, they can be held to it: names and numbers all, repeats in few."""
    found = rows("bookings", split)
    for row in found:
        told = (row["summary"], row["dialogue"])
        assert foreign_names(*told) == foreign_numbers(*told) == non_words(*told) == [], row
        assert len(row["summary"].split()) <= 40
    assert sum(bool(repeats(row["summary"], row["dialogue"])) for row in found) <= 2
