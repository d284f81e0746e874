"""Splits, tokens, and what becomes of them in batches."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from minilora.summarization.data import batches, splits
from minilora.summarization.data.batches import Encoded
from minilora.summarization.data.reading import Example
from minilora.summarization.errors import UserError
from minilora.summarization.settings import DataOptions
from tests.helpers import (
    EXPECTED,
    GOOD,
    as_csv,
    as_json,
    as_jsonl,
    byte_level_bpe,
    load,
    rows,
    write,
)


@pytest.fixture(scope="module")
def samsum() -> Path:
    path = Path(__file__).parents[2] / "shared" / "data" / "samsum"
    if not path.is_dir():
        pytest.skip("SAMSum is not in ../shared/data/samsum")
    return path


# Splits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", ["validation", "val", "dev", "valid"])
def test_directory(tmp_path: Path, validation: str) -> None:
    write(tmp_path / "train.json", as_json(rows(5)))
    write(tmp_path / f"{validation}.jsonl", as_jsonl(rows(3, 10)))
    write(tmp_path / "test.csv", as_csv(rows(2, 20)))
    write(tmp_path / "README.md", b"text")
    found, notices = load(tmp_path)
    assert {split: len(examples) for split, examples in found.items()} == {
        "train": 5,
        "validation": 3,
        "test": 2,
    }
    assert notices == ""
    assert list(load(tmp_path, "test")[0]) == ["test"]


def test_one_split_does_not_need_the_others(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.json", b"broken")
    write(tmp_path / "test.json", as_json(rows(2)))
    assert len(load(tmp_path, "test")[0]["test"]) == 2


def test_two_files_for_one_split(tmp_path: Path) -> None:
    write(tmp_path / "val.json", as_json(rows(5)))
    write(tmp_path / "validation.csv", as_csv(rows(5)))
    with pytest.raises(UserError, match=r"val\.json and .*validation\.csv are both validation"):
        load(tmp_path)


def test_no_train_file(tmp_path: Path) -> None:
    write(tmp_path / "test.json", as_json(rows(5)))
    with pytest.raises(UserError, match=r"no train data; found: .*test\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="no validation data"):
        load(tmp_path, "validation")
    assert len(load(tmp_path, "test")[0]["test"]) == 5


def test_directory_without_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found: none"):
        load(tmp_path)
    for number in range(15):
        write(tmp_path / f"notes{number:02}.txt", b"")
    with pytest.raises(UserError, match=r"expected train, .* found: notes00\.txt, .* and 5 more"):
        load(tmp_path)


def test_empty_split(tmp_path: Path) -> None:
    write(tmp_path / "train.json", as_json(rows(5)))
    write(tmp_path / "val.json", b"[]")
    with pytest.raises(UserError, match=r"val\.json: no rows"):
        load(tmp_path)


def test_missing_test_is_said(tmp_path: Path) -> None:
    write(tmp_path / "train.json", as_json(rows(5)))
    write(tmp_path / "val.json", as_json(rows(3, 10)))
    found, notices = load(tmp_path)
    assert found["test"] == found["validation"]
    assert "no test data" in notices
    assert "val.json, which also chooses the best epoch" in notices
    assert load(tmp_path, "train", "validation")[1] == ""


def test_missing_validation_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "train.json", as_json(rows(1000)))
    write(tmp_path / "test.json", as_json(rows(3, 2000)))
    found, notices = load(tmp_path)
    held_out = {example.id for example in found["validation"]}
    assert 25 <= len(held_out) <= 75
    assert held_out.isdisjoint(example.id for example in found["train"])
    assert len(found["train"]) + len(held_out) == 1000
    assert len(found["test"]) == 3
    assert "no validation data: rows of" in notices
    assert load(tmp_path, "validation")[0]["validation"] == found["validation"]


def test_one_file_is_divided_for_good(tmp_path: Path) -> None:
    """Rows that come later, in front or behind, move no other row to another split."""
    path = write(tmp_path / "all.jsonl", as_jsonl(rows(500)))
    before, notices = load(path)
    assert "no validation and test data: rows of" in notices
    assert sum(map(len, before.values())) == 500
    write(path, as_jsonl([*rows(100, 1000), *rows(500), *rows(100, 2000)]))
    after, _ = load(path)
    for split, examples in before.items():
        assert set(examples) <= set(after[split])
        assert [e.id for e in examples] == sorted(
            (e.id for e in examples), key=lambda i: int(i[1:])
        )


def test_twins_stay_together(tmp_path: Path) -> None:
    content = [row | {"id": str(i)} for i, row in enumerate(rows(200) * 2)]
    found, _ = load(write(tmp_path / "all.json", as_json(content)))
    dialogues = [{example.dialogue for example in examples} for examples in found.values()]
    assert sum(map(len, dialogues)) == 200


@pytest.mark.parametrize("count", range(1, 25))
def test_small_files(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "all.json", as_json(rows(count)))
    if count < 3:
        with pytest.raises(UserError, match=r"all\.json: too few rows"):
            load(path)
    else:
        assert all(load(path)[0].values())


@pytest.mark.parametrize("dialogue", [" \r\n", None, [], ["", " "]], ids=str)
def test_an_empty_dialogue_only_stops_what_is_scored(tmp_path: Path, dialogue: object) -> None:
    empty = GOOD | {"id": "e-9", "dialogue": dialogue}
    write(tmp_path / "validation.json", as_json(rows(5, 10)))
    write(tmp_path / "test.json", as_json(rows(5, 20)))
    write(tmp_path / "train.json", as_json([*rows(5), empty]))
    found, notices = load(tmp_path)
    assert len(found["train"]) == 5
    assert notices == f"{tmp_path}/train.json row 6 (id e-9): empty dialogue, left out"
    write(tmp_path / "test.json", as_json([*rows(5, 20), empty]))
    with pytest.raises(UserError, match=r"test\.json row 6 \(id e-9\): empty dialogue; --skip"):
        load(tmp_path)
    assert len(load(tmp_path, skip_bad_rows=True)[1].split("\n")) == 2


def test_the_embedded_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found, notices = load(DataOptions().data)
    assert [len(examples) for examples in found.values()] == [1200, 150, 200]
    assert notices == ""


# SAMSum -------------------------------------------------------------------------------------------


def test_samsum(samsum: Path) -> None:
    found, notices = load(samsum)
    assert [len(examples) for examples in found.values()] == [14_731, 818, 819]
    empty, *twice = notices.split("\n")
    assert empty.endswith("train.json row 6055 (id 13828807): empty dialogue, left out")
    assert twice == [
        "validation: 47 dialogues of 818 are also in the training data",
        "test: 42 dialogues of 819 are also in the training data",
    ]
    assert not any("\r" in e.dialogue + e.summary for part in found.values() for e in part)


def test_fingerprint() -> None:
    one, two = EXPECTED
    assert splits.fingerprint([one, two]) == splits.fingerprint(iter([one, two]))
    moved = Example(one.id + "A", "nn: hi\nBob: hello", one.summary)
    others = [[two, one], [one], [moved, two], [one, two, two], []]
    assert len({splits.fingerprint(other) for other in [[one, two], *others]}) == 6
    assert len(splits.fingerprint([])) == 64


# Tokens -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bart() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_bpe()
    tokenizer.model_max_length = 32  # which must not matter
    return tokenizer


@pytest.fixture(scope="module")
def t5() -> T5Tokenizer:
    pieces = ["▁", "▁hello", "▁there", "▁Ann", "▁Summary", ":", *"abcdefghijklmnopqrstuvwxyzABCS?."]
    base = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=base + [(piece, -1.0 - i / 100) for i, piece in enumerate(pieces)])


PROMPT = DataOptions(
    prompt_before="Summarize the following conversation.\\n\\n", prompt_after="\\n\\nSummary: "
)


def read(dialogue: str, options: DataOptions) -> str:
    """The text that the model reads."""
    before, after = batches.prompt(options)
    return before + dialogue + after


def test_prompt() -> None:
    assert read("A: b", PROMPT) == "Summarize the following conversation.\n\nA: b\n\nSummary: "
    assert read("A: b\\n", DataOptions()) == "A: b\\n"


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_short_texts_are_the_tokenizers_own(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    encoded, truncation = batches.encode(EXPECTED * 300, tokenizer, PROMPT)
    assert [row.id for row in encoded] == ["a-1", "a-2"] * 300
    for row, expected in zip(encoded, EXPECTED * 300, strict=True):
        assert row.source == tokenizer(read(expected.dialogue, PROMPT)).input_ids
        assert row.target == tokenizer(text_target=expected.summary).input_ids
    assert truncation == batches.Truncation(0, 0, 600)


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("prompt", [PROMPT, DataOptions()])
def test_a_long_dialogue_loses_its_end(
    name: str, prompt: DataOptions, request: pytest.FixtureRequest, capfd: Any
) -> None:
    tokenizer = request.getfixturevalue(name)
    whole = Example("1", "Ann: hello there?\n" * 100 + "Bob: end", "hello there " * 40)
    options = DataOptions(
        prompt_before=prompt.prompt_before,
        prompt_after=prompt.prompt_after,
        max_source_length=250,
        max_target_length=20,
    )
    (_, long), truncation = batches.encode([EXPECTED[1], whole], tokenizer, options)
    assert (len(long.source), len(long.target)) == (250, 20)
    full = tokenizer(read(whole.dialogue, options), verbose=False).input_ids
    kept = tokenizer.decode(long.source, skip_special_tokens=True)
    start = tokenizer.decode(full[:200], skip_special_tokens=True)
    assert kept.startswith(start)
    assert kept.endswith("Summary: " if name == "bart" else "Summary:") or prompt is not PROMPT
    assert "Bob" not in kept
    assert long.source[0] == full[0]
    assert long.source[-1] == long.target[-1] == tokenizer.eos_token_id
    assert long.source.count(tokenizer.eos_token_id) == 1
    assert truncation == batches.Truncation(1, 1, 2)
    assert "1 of 2 dialogues" in str(truncation)
    assert "longer than" not in capfd.readouterr().err


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.integers(0, 40)
    ).map(lambda drawn: drawn[0] * drawn[1]),
    st.integers(60, 120),
)
@example("Ann: hello there? " * 20, 60)
def test_cutting_keeps_both_ends(bart: Any, dialogue: str, limit: int) -> None:
    options = DataOptions(
        prompt_before="Read: ", prompt_after="\\nSummary:", max_source_length=limit
    )
    (row,), truncation = batches.encode([Example("1", dialogue, "x")], bart, options)
    end = bart("\nSummary:").input_ids[1:]
    assert len(row.source) <= limit
    assert row.source[-len(end) :] == end
    assert row.source[0] == bart.bos_token_id
    assert (truncation.sources == 0) or len(row.source) == limit


def test_a_dialogue_writes_no_special_tokens(bart: Any) -> None:
    (row,), _ = batches.encode([Example("1", "A: </s> <pad><s>", "a </s> b")], bart, DataOptions())
    assert [i for i in row.source if i < 5] == [i for i in row.target if i < 5] == [0, 2]
    assert bart.decode(row.source, skip_special_tokens=True) == "A: </s> <pad><s>"
    assert bart("</s>").input_ids == [0, 2, 2]  # the tokenizer itself is as it was


def test_no_room_for_the_dialogue(bart: Any) -> None:
    used = len(bart(read("", PROMPT)).input_ids)
    settings = {"prompt_before": PROMPT.prompt_before, "prompt_after": PROMPT.prompt_after}
    says = rf"--max-source-length {used} \(or .*\): prompt .* alone take {used}"
    with pytest.raises(UserError, match=says):
        batches.encode(EXPECTED, bart, DataOptions(**settings, max_source_length=used))
    batches.encode(EXPECTED, bart, DataOptions(**settings, max_source_length=used + 1))
    with pytest.raises(UserError, match="--max-target-length 2"):
        batches.encode(EXPECTED, bart, DataOptions(max_target_length=2))


def test_nothing_to_encode(bart: Any) -> None:
    assert batches.encode([], bart, DataOptions()) == ([], batches.Truncation(0, 0, 0))
    (row,), _ = batches.encode([Example("stdin", "A: b", "")], bart, DataOptions())
    assert row.target == [0, 2]


# Batches ------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.tuples(st.integers(2, 512), st.integers(2, 90)), max_size=300)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 10), st.integers(0, 10))
def test_every_index_once(lengths: list[tuple[int, int]], size: int, seed: int, epoch: int) -> None:
    found = batches.batches(lengths, size, seed, epoch)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert [len(batch) for batch in found if len(batch) != size] in ([], [len(lengths) % size])
    assert found == batches.batches(lengths, size, seed, epoch)


def samsum_like(count: int) -> list[tuple[int, int]]:
    """Log-normal, with the median and the 90th percentile of SAMSum in BART tokens."""
    draw = random.Random(1)
    return [
        (
            min(512, int(121 * 2.718 ** draw.gauss(0, 0.69))) + 2,
            int(24 * 2.718 ** draw.gauss(0, 0.5)) + 2,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(("size", "targets"), [(8, 1.6), (32, 1.95)])
def test_little_padding(size: int, targets: float) -> None:
    """1.03 and 1.04, where batches drawn at random have 2.2 and 3.0.

    Targets vary among dialogues of one length: 1.55 and 1.89, at random 1.84 and 2.5.
    """
    lengths = samsum_like(14_731)
    for side, limit in ((0, 1.05), (1, targets)):
        real = sum(pair[side] for pair in lengths)
        padded = sum(
            len(batch) * max(lengths[i][side] for i in batch)
            for batch in batches.batches(lengths, size, 0, 0)
        )
        assert padded / real < limit


def test_batches_are_shuffled_anew() -> None:
    lengths = samsum_like(2000)
    first, second, other = (
        batches.batches(lengths, 8, *which) for which in ((0, 0), (0, 1), (1, 0))
    )
    assert len({str(first), str(second), str(other)}) == 3
    together = [{frozenset(batch) for batch in found} for found in (first, second)]
    assert len(together[0] & together[1]) < len(first) / 10
    longest = [max(lengths[i][0] for i in batch) for batch in first]
    half = len(longest) // 2  # lengths follow no order over the epoch
    assert 0.8 < sum(longest[:half]) / sum(longest[half:]) < 1.25


def test_batches_leave_the_global_state_alone() -> None:
    random.seed(5)
    state, torch_state = random.getstate(), torch.get_rng_state()
    found = batches.batches(samsum_like(100), 8, 0, 0)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    random.seed(6)
    assert batches.batches(samsum_like(100), 8, 0, 0) == found


def test_batches_are_the_same_on_every_machine() -> None:
    """A run is resumed by position: another order would repeat and lose examples silently."""
    lengths = [(i % 7, i % 3) for i in range(12)]
    assert batches.batches(lengths, 4, 3, 1) == [[5, 2, 8, 11], [1, 4, 10, 7], [9, 6, 0, 3]]


@given(LENGTHS, st.integers(1, 40))
def test_longest_first(lengths: list[tuple[int, int]], size: int) -> None:
    encoded = [Encoded(str(i), [5] * s, [5] * t) for i, (s, t) in enumerate(lengths)]
    order = [i for batch in batches.by_length(encoded, size) for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i][0] for i in order] == sorted((s for s, _ in lengths), reverse=True)


@given(
    st.lists(
        st.tuples(*[st.lists(st.integers(0, 50), min_size=1, max_size=20)] * 2),
        min_size=1,
        max_size=9,
    ),
    st.integers(0, 3),
)
def test_collate(rows: list[tuple[list[int], list[int]]], pad: int) -> None:
    """Also where the texts hold the pad token: the mask and the labels go by length."""
    batch = batches.collate([Encoded("", source, target) for source, target in rows], pad)
    width, depth = (max(len(row[side]) for row in rows) for side in (0, 1))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), width)
    assert batch["labels"].shape == (len(rows), depth)
    for number, (source, target) in enumerate(rows):
        end, stop = len(source), len(target)
        assert batch["input_ids"][number].tolist() == source + [pad] * (width - end)
        assert batch["attention_mask"][number].tolist() == [1] * end + [0] * (width - end)
        assert batch["labels"][number].tolist() == target + [-100] * (depth - stop)
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_files_that_are_no_split_are_named(tmp_path: Path) -> None:
    for i, name in enumerate(("train", "more", "validation", "test", "extra")):
        write(tmp_path / f"{name}.jsonl", as_jsonl(rows(3, 3 * i)))
    write(tmp_path / "README.md", b"about")
    found, notices = load(tmp_path)
    assert len(found["train"]) == 3
    assert notices == f"{tmp_path}: not read: extra.jsonl, more.jsonl"
    write(tmp_path / "train_2.jsonl", as_jsonl(rows(3)))
    with pytest.raises(UserError, match=r"train\.jsonl and .*train_2\.jsonl are both train"):
        load(tmp_path)
    assert load("bookings")[1] == ""
