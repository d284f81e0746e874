"""Dialogues in other scripts: ROUGE reads them, and the best epoch is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file

import minilora
from minilora.summarization.cli import train_main
from minilora.summarization.evaluation.rouge import UnicodeWords, rouge, tokenizer_for
from minilora.summarization.report.runs import read_report
from minilora.summarization.training import trainer
from tests.helpers import as_jsonl, records, save_bart, write

WORDS = {
    "Анна и Борис встретятся в парке.": "анна и борис встретятся в парке",
    "安娜和Bob明天8点见面。": "安 娜 和 bob 明 天 8 点 见 面",
    "アンナは行く": "ア ン ナ は 行 く",
    "อันนา": "อั น น า",
    "हम कल मिलेंगे": "हम कल मिलेंगे",  # vowels are marks, not letters
    "سنلتقي غدا": "سنلتقي غدا",
    "안나는 공원에서": "안나는 공원에서",
    "Straße, cafe\u0301": "straße café",
    "Anna's dogs don't_run at 16:00!": "anna s dog don t run at 16 00",  # as rouge_score
}


@pytest.mark.parametrize("text", WORDS)
def test_words(text: str) -> None:
    assert " ".join(UnicodeWords().tokenize(text)) == WORDS[text]
    assert rouge([text], [text]) == [
        dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 100)
    ]


def test_english_scores_do_not_move() -> None:
    """Names with accents leave rouge_score's tokenizer, as its figures for SAMSum were made."""
    references = ["Ann meets Zoé at a café."] + ["Bob runs and Cy is running late."] * 100
    predictions = ["Ann met Zoé in the cafés."] + ["Bob runs late."] * 100
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    found = rouge(predictions, references)
    for row, prediction, reference in zip(found, predictions, references, strict=True):
        expected = scorer.score(reference, prediction)
        assert row == {name: 100 * score.fmeasure for name, score in expected.items()}


def test_of_several_references_in_another_script_the_best_counts() -> None:
    references = ["Анна и Борис встретятся в парке.", "Анна идёт домой.", "Ann goes home."]
    (best,) = rouge(["Анна и Борис идут домой."], [references])
    alone = rouge(["Анна и Борис идут домой."] * 2, references[:2])
    assert best == {name: max(row[name] for row in alone) for name in best}
    assert alone[0]["rouge1"] > 0
    # One choice for all: of the references of every row, not of each row's or of the first's.
    mixed = [["Ann goes home.", "Анна идёт домой."], ["Bob runs."]]
    assert rouge(["Анна идёт домой.", "Bob runs."], mixed)[0]["rouge1"] == 100


def test_which_tokenizer() -> None:
    assert tokenizer_for(["Ann meets Bob.", "16:00 😂"]) == "rouge_score"
    assert tokenizer_for([]) == "rouge_score"
    assert tokenizer_for(["Ann meets Bob."] * 5 + ["Анна"]) == "unicode"
    assert tokenizer_for(["Jörg trifft Anna."]) == "unicode"


def test_samsum_keeps_its_tokenizer(shared: Path) -> None:
    for name in ("train", "val", "test"):
        rows = json.loads((shared / f"data/samsum/{name}.json").read_text())
        assert tokenizer_for([row["summary"] for row in rows]) == "rouge_score"


def chats(names: str, places: str, dialogue: str, summary: str, count: int) -> list[Any]:
    people, where = names.split(), places.split()
    rows = []
    for i in range(count):
        given = {"a": people[i % 4], "b": people[(i + 1) % 4], "p": where[i // 4 % 3]}
        texts = {"dialogue": dialogue.format(**given), "summary": summary.format(**given)}
        rows.append({"id": f"r{i}", **texts})
    return rows


CHATS = {
    "Russian": (
        *("Анна Борис Вера Глеб", "парк бар дом"),
        *("{a}: идём в {p}?\n{b}: да", "{a} и {b} идут в {p}."),
    ),
    "Chinese": (
        *("安娜 鲍勃 陈明 李华", "公园 学校 商店"),
        *("{a}:去{p}吗?\n{b}:好", "{a}和{b}去{p}。"),
    ),
}


@pytest.mark.parametrize("language", CHATS)
def test_a_run_in_another_script_keeps_its_best_epoch(language: str, tmp_path: Path) -> None:
    rows = chats(*CHATS[language], 36)
    save_bart(tmp_path / "bart")
    for split, some in (("train", rows[:24]), ("validation", rows[24:30]), ("test", rows[30:])):
        write(tmp_path / f"{split}.jsonl", as_jsonl(some))
    argv = ["--model", tmp_path / "bart", "--data", tmp_path, "--output", tmp_path / "run"]
    argv += ["--epochs", 12, "--method", "full", "--learning-rate", "0.02", "--device", "cpu"]
    argv += ["--precision", "fp32", "--batch-size", 4, "--beams", 1, "--min-length", 0]
    assert train_main(list(map(str, argv))) == 0
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert found["rouge_tokenizer"] == "unicode"
    assert found["finetuned"]["rouge1"] > 20
    log = [r for r in records(tmp_path / "run") if r["kind"] == "validation"]
    best = max(log, key=lambda r: (r["rouge1"], -r["loss"]))
    assert best["rouge1"] > 20
    assert best["epoch"] > 1
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert f"step-{best['step']:08d}-validated" in kept


@pytest.mark.parametrize(
    ("rouges", "losses", "best"),
    [
        ([0, 0, 0, 0], [9.0, 4.5, 3.9, 4.1], 3),  # zeros: the loss decides
        ([40, 40, 30], [2.0, 1.0, 0.5], 2),  # a tie
        ([40, 40, 40], [1.0, 1.0, 2.0], 1),  # nothing better comes
        ([10, 50, 20], [3.0, 2.0, 1.0], 2),  # ROUGE decides
    ],
)
def test_the_loss_breaks_ties(
    rouges: list[float], losses: list[float], best: int, tmp_path: Path, monkeypatch: Any
) -> None:
    scores = iter(zip(rouges, losses, strict=True))

    def validate(_: object) -> dict[str, float]:
        score, loss = next(scores)
        return {"loss": loss, "rouge1": score, "rouge2": 0.0, "rougeL": 0.0, "rougeLsum": 0.0}

    monkeypatch.setattr(trainer, "validate", validate)
    save_bart(tmp_path / "bart")
    rows = chats(*CHATS["Chinese"], 8)
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", as_jsonl(rows))
    argv = ["--model", tmp_path / "bart", "--data", tmp_path, "--output", tmp_path / "run"]
    argv += ["--epochs", len(losses), "--batch-size", 8, "--device", "cpu", "--no-evaluate"]
    argv += ["--keep-checkpoints", len(losses), "--learning-rate", "0.1", "--precision", "fp32"]
    assert train_main([*map(str, argv), "--no-report"]) == 0
    checkpoint = next((tmp_path / "run/checkpoints").glob(f"step-{best:08d}-*"))
    wanted = load_file(checkpoint / "state.safetensors")
    kept = minilora.read_adapter(tmp_path / "run/adapter").tensors
    for name, tensor in kept.items():
        plain = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(tensor, wanted[f"parameter.{plain}"])
    shown = read_report(tmp_path / "run").best
    assert shown is not None
    assert shown["step"] == best
