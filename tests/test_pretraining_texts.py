"""What is chosen from the texts of pre-training and counted in them; the texts are not needed."""

import json
import lzma
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .test_pretraining import script

bookings = script("bookings")
words = script("words")
overlap = script("overlap")

# Bookings -----------------------------------------------------------------------------------------

CHAT = """Ann: I want a table for two at Luigi Pizza in San Jose, at 7 pm.
Bob: Today? It is a good Italian place, with music and a view, and they have one table left.
Ann: Yes please, today, and thank you for all the help with this, it is a special evening.
Bob: Done! Your table for two is booked."""


def pair(identity: str = "sgd-train-1_00001-0", **fields: str) -> dict[str, str]:
    summary = "Ann books a table for two at Luigi Pizza at 7 pm today."
    return {"id": identity, "dialogue": CHAT, "summary": summary} | fields


def chosen(*pairs: dict[str, str]) -> list[str]:
    splits = bookings.choose(list(pairs))
    return [row["summary"] for rows in splits.values() for row in rows]


def test_a_booking_is_chosen() -> None:
    assert chosen(pair()) == [pair()["summary"]]
    assert bookings.kinds(pair()) == ["table"]


@pytest.mark.parametrize(
    "fields",
    [
        {"summary": "Ann books a table for two at Luigi Pizza at 8 pm today."},  # another time
        {"summary": "Ann books a table for two at Mario Pizza at 7 pm today."},  # another place
        {"summary": "Ann books a table for two at luigi pizza at 7 pm today."},  # no capitals
        {"summary": "Ann asks about the weather in San Jose at 7 pm on this day."},  # another kind
        {"summary": "Ann books a table for two."},  # too little
        {"dialogue": CHAT + " Do you want a taxi?"},  # breaks off
        {"dialogue": "Ann: Luigi Pizza, 7 pm.\nBob: Booked."},  # too short
    ],
)
def test_what_is_not_chosen(fields: dict[str, str]) -> None:
    assert chosen(pair(**fields)) == []


def test_one_of_a_conversation_and_one_of_a_wording() -> None:
    again = {
        "dialogue": CHAT.replace("Ann", "Eve"),
        "summary": pair()["summary"].replace("Ann", "Eve"),
    }
    assert len(chosen(pair(), pair("sgd-train-1_00002-0", **again))) == 1  # the same but for names
    other = {
        "dialogue": CHAT.replace("Luigi", "Mario"),
        "summary": pair()["summary"].replace("Luigi", "Mario"),
    }
    assert len(chosen(pair(), pair("sgd-train-1_00001-1", **other))) == 1  # the same conversation
    assert len(chosen(pair(), pair("sgd-train-1_00002-0", **other))) == 2


def test_the_wording_is_made_plain() -> None:
    text = "Ann is looking for a moderate cantonese restaurant in Rome. Bob suggests Chi at 7 PM."
    better = bookings.polished(bookings.polished(text, bookings.FORM), bookings.STYLE)
    assert better == (
        "Ann is looking for a moderately priced Cantonese restaurant in Rome, and Bob suggests Chi"
        " at 7 pm."
    )


def test_what_pre_training_may_read() -> None:
    weather = "Ann asks about the weather."
    taken = {"sgd-train-1_00001-0"}
    assert not bookings.apart(pair("sgd-train-1_00001-2", summary=weather), taken)  # its other part
    assert not bookings.apart(pair("sgd-train-1_00002-0"), taken)  # its wording
    assert bookings.apart(pair("sgd-train-1_00002-0", summary=weather), taken)


# Common words -------------------------------------------------------------------------------------


def test_a_word_needs_two_collections_and_edited_texts() -> None:
    prose = (
        "baked baked baked Paris Paris Paris Tom's tom's tom's tom's oddly oddly oddly x@wrong.org"
    )
    chats = "baked lol lol lol lol Paris tom's oddly-shaped wrong"
    found = words.common([("prose_a", prose), ("chat_b", chats), ("chat_c", chats)])
    assert sorted(found) == ["baked", "tom"]


@given(st.lists(st.from_regex("[a-e]{1,5}(s|es|ed|ing|er|y|ies|ly)?", fullmatch=True), unique=True))
def test_the_list_is_read_as_it_was_written(listed: list[str]) -> None:
    read = set()
    for line in words.lines(listed):
        base, *endings = line.split()
        read |= {base, *(base[:-1] + e[1:] if e[0] == "-" else base + e for e in endings)}
    assert read == set(listed)


def test_inflections_share_a_line() -> None:
    told = "bake bakes baked baking city cities swap swapping happy happier bus"
    assert words.lines(told.split()) == [
        "bake -ing d s",
        "bus",
        "city -ies",
        "happy -ier",
        "swap ping",
    ]


# Overlaps -----------------------------------------------------------------------------------------


def test_runs_leave_speakers_and_marks_out() -> None:
    assert list(overlap.runs("Ann: One, two three!\nBob: four’s five", 4)) == [
        "one two three four's",
        "two three four's five",
    ]
    assert list(overlap.runs("one two")) == []
    slots = "\ue000: \ue001's dog barks"  # a prepared text
    assert [*overlap.runs(slots, 3)] == [*overlap.runs("Anna: Tom's dog barks", 3)]


def test_the_report_finds_what_was_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A summary of 20 words in the prose, 8 words in the chats' turns, nothing in the pairs."""
    long = " ".join(f"w{chr(97 + i)}" for i in range(20))
    held = [
        {"id": "1", "dialogue": "A: a b c d e f g h i\nB: j", "summary": long},
        {"id": "2", "dialogue": "A: nothing of it", "summary": "at all"},
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    texts = tmp_path / "texts"
    texts.mkdir()
    seen: dict[str, list[dict[str, Any]]] = {
        "prose": [{"text": f"before {long.upper()} after"}],
        "chats": [{"turns": [["A", "x", "a b c d"], ["B", "x", "e f g h!"]]}],
        "pairs": [{"dialogue": "A: a b c d", "summary": "w1 w2"}],
    }
    for name, rows in seen.items():
        with lzma.open(texts / f"{name}.jsonl.xz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    (texts / "places.json").write_text('["Whitby", "New York"]')
    out = tmp_path / "out.json"
    told = ["overlap.py", "--texts", str(texts), "--held", f"X={tmp_path / 'held.jsonl'}"]
    monkeypatch.setattr(sys, "argv", [*told, "--json", str(out)])
    overlap.main()
    report = json.loads(out.read_text())
    found = {
        name: [report[f"{name}.jsonl.xz / X"][key] for key in ("runs", "chats_with_one")]
        + [report[f"{name}.jsonl.xz / X"]["chats_with_sixteen"]]
        for name in seen
    }
    assert found == {"prose": [13, 1, 1], "chats": [1, 1, 0], "pairs": [0, 0, 0]}
    assert report["chats.jsonl.xz / X"]["of"] == 13 + 3
    assert re.search(r"prose.jsonl.xz +X +13 of +16 runs", capsys.readouterr().out)
