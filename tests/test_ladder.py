"""The ladder: rates from a data set's grid, kept runs, what is scored, the table, the reading."""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minilora.summarization.data.reading import Example
from minilora.summarization.evaluation.nonsense import MEASURES

from .helpers import SMALL, dialogues, save_bart, save_data

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Any:
    """They import each other by bare names."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    names = ("common", "grid", "pocket", "ladder", "tables", "reading")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


# Rates and kept runs ------------------------------------------------------------------------------


def test_every_contestant_has_a_method_with_three_rates_or_more(scripts: Any) -> None:
    pocket, grid = scripts.pocket, scripts.grid
    assert {method for method, _ in pocket.CONTESTANTS.values()} == set(grid.METHODS)
    assert min(len(rates) for rates in grid.RATES.values()) >= 3
    assert "--targets" not in grid.METHODS["preset"]  # the preset's


def test_the_lengths_are_those_of_the_preset_on_all_data(scripts: Any) -> None:
    flags = scripts.common.flags_of_data
    assert flags("minichat") == ["--data", "minichat"]
    assert flags("x/samsum")[2:] == ["--min-length", "5", "--max-length", "60"]


@pytest.fixture
def results(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty benchmarks/results."""
    (tmp_path / "results").mkdir()
    for module in (scripts.common, scripts.pocket, scripts.tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_rates_are_of_the_grid_of_this_data_and_these_weights(
    scripts: Any, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["LoRA r 2", "LoRA r 8, all-linear", "full fine-tuning"]

    def refused(*methods: str) -> None:
        with pytest.raises(SystemExit) as caught:
            scripts.pocket.rates_of("some/samsum", names)
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        command = "python benchmarks/grid.py --data some/samsum --methods"
        assert f"`{command} {' '.join(methods)}`" in line

    refused("preset", "all-linear", "full")
    weights = scripts.common.digest([scripts.common.WEIGHTS])
    grid: dict[str, Any] = {"settings": {"weights": weights}, "chosen": {"q/v": 1, "full": 5e-4}}
    (results / "grid_samsum.json").write_text(json.dumps(grid))
    refused("q/v", "full", "preset", "all-linear")  # none is lost
    grid["chosen"] |= {"preset": 4e-3, "all-linear": 2e-3}
    (results / "grid_samsum.json").write_text(json.dumps(grid))
    rates = scripts.pocket.rates_of("some/samsum", names)
    assert rates == dict(zip(names, (4e-3, 2e-3, 5e-4), strict=True))
    grid["settings"]["weights"] = "0"
    (results / "grid_samsum.json").write_text(json.dumps(grid))
    refused("q/v", "full", "preset", "all-linear")


CODE_AND_MODEL = (
    "minilora/a.py", "pocket-bart/model.safetensors", "pocket-bart/config.json",
    "pocket-bart/generation_config.json",
)  # fmt: skip


@pytest.fixture
def tree(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a model, a library and data."""
    for name in CODE_AND_MODEL:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    save_data(tmp_path / "chats")
    monkeypatch.setattr(scripts.common, "ROOT", tmp_path)
    monkeypatch.setattr(scripts.common, "POCKET_BART", tmp_path / "pocket-bart")
    return tmp_path


def test_a_digest_is_of_all_that_decides_a_run(scripts: Any, tree: Path) -> None:
    flags = ["--rank", "8", "--data", str(tree / "chats")]
    found = [scripts.common.run_digest(flags)]
    assert found == [scripts.common.run_digest(flags)]
    found += [scripts.common.run_digest(), scripts.common.run_digest(["--rank", "4", *flags[2:]])]
    for name in (*CODE_AND_MODEL, "chats/test.jsonl"):
        (tree / name).write_text("2")
        found.append(scripts.common.run_digest(flags))
    assert len(set(found)) == len(found) == 8
    (tree / "pocket-bart/README.md").write_text("2")  # the model card decides nothing
    assert scripts.common.run_digest(flags) == found[-1]


def test_a_result_has_each_list_of_numbers_on_a_line(scripts: Any, results: Path) -> None:
    content = {"a": [1, -2.5, 1e-9], "b": [[1, 2], [3]], "c": ["x", 1], "d": "[ 1, 2 ]", "e": []}
    text = scripts.common.write_result("made", content, folder=results).read_text()
    assert json.loads(text).items() >= content.items()
    assert '  "a": [1, -2.5, 1e-09],' in text.splitlines()


def test_a_run_of_pocket_counts_once_it_has_a_result(
    scripts: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def start(command: list[str], **_: Any) -> argparse.Namespace:
        """What the process would write, if it is not stopped."""
        folder = Path(json.loads(command[-1])["directory"])
        (folder / "run").mkdir()  # fails where an earlier one was left
        started.append(folder)
        if code := int(len(started) == 1):
            return argparse.Namespace(returncode=code)
        (folder / "result.json").write_text(json.dumps({"summaries": []}))
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(scripts.common.subprocess, "run", start)
    options = argparse.Namespace(keep=tree / "kept", data="minichat", jobs=1)
    with pytest.raises(SystemExit, match=r"exit code 1: see .*output\.txt"):
        scripts.pocket.run("LoRA r 8", 0, 4e-3, options, [])
    for rate, more, runs in ((4e-3, [], 2), (4e-3, [], 2), (8e-3, [], 3), (4e-3, ["-x"], 4)):
        found = scripts.pocket.run("LoRA r 8", 0, rate, options, more)
        assert found == {"summaries": []}
        assert len(started) == runs
    assert started[0] == started[1]


def test_a_row_of_the_grid_counts_once_it_is_done(
    scripts: Any, results: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best rate is the one with the highest ROUGE-1 of the last epoch, and not at an end."""
    started: list[list[str]] = []

    def start(command: list[str], **_: Any) -> argparse.Namespace:
        output, rate = Path(command[-1]), float(command[command.index("--learning-rate") + 1])
        output.mkdir()
        started.append(command)
        epochs = [(50.0, 3.0), (20 - abs(math.log2(rate / peak)), 2.0)]
        lines = [{"kind": "validation", "rouge1": r, "loss": loss} for r, loss in epochs]
        (output / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return argparse.Namespace(returncode=int(len(started) == 1))

    monkeypatch.setattr(scripts.common.subprocess, "run", start)
    argv = ["grid.py", "--data", "minichat", "--keep", str(tree / "kept"), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "--methods", "preset", "--epochs", "2"])
    peak = 2e-3
    with pytest.raises(SystemExit, match="exit code 1"):
        scripts.grid.main()
    for _ in range(2):
        scripts.grid.main()
        assert len(started) == 4  # one was stopped
    assert started[0] in started[1:]
    assert all({"--no-evaluate", "--epochs", "--data"} <= set(command) for command in started)
    found = json.loads((results / "grid_minichat.json").read_text())
    assert found["chosen"] == {"preset": 2e-3}
    assert found["settings"]["flags"] == ["--epochs", "2"]
    # While the best rate is at an end there is one more, two at most.
    for peak, best, count in ((8e-3, 8e-3, 5), (5e-4, 5e-4, 5), (1.0, 1.6e-2, 5)):
        started.clear()
        started.append([])
        monkeypatch.setattr(sys, "argv", [*argv, "--methods", "preset", "--epochs", str(peak)])
        scripts.grid.main()
        found = json.loads((results / "grid_minichat.json").read_text())
        assert (found["chosen"], len(started)) == ({"preset": best}, 1 + count)


@pytest.mark.parametrize("script", ["grid", "pocket"])
def test_data_that_is_not_there_is_named_in_one_line(
    scripts: Any, script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--data", "./nowhere"])
    with pytest.raises(SystemExit) as caught:
        getattr(scripts, script).main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere: no such file" in line


# What is scored -----------------------------------------------------------------------------------

TEST = [
    Example("a", "Ann: cake?\nBob: at 4\nAnn: yes\nBob: ok", "Bob has cake at 4."),
    Example("b", "Cy: hi\nDee: the bus is late", "The bus is late."),
]


def made_up(name: str, seed: int, *texts: str) -> dict[str, Any]:
    training = {"learning_rate": 4e-3, "trainable": 10, "minutes": 1.0, "peak_gib": 1.0}
    validation = [{"loss": 2.0, "rouge1": 30.0}]
    found = {"name": name, "seed": seed, "summaries": list(texts), "gen_len": 9.0}
    return found if name == "base" else {**found, **training, "validation": validation}


@pytest.fixture(scope="module")
def result(scripts: Any) -> dict[str, Any]:
    runs = [
        made_up("base", 0, "Tea today.", "Cy has a bus."),
        made_up("LoRA r 8", 0, "Bob has cake at 4.", "We see Zoe at 7."),
        made_up("LoRA r 8", 1, "Bob has cake at 4.", "The bus is late."),
        made_up("full fine-tuning", 0, "Bob has cake at 4.", "The bus is late."),
    ]
    told = {"data": "bookings", "weights": "abc"}
    found: dict[str, Any] = told | scripts.pocket.collected(runs, TEST)
    return found


def test_each_side_is_scored_by_the_librarys_measures(result: dict[str, Any]) -> None:
    lora, full = result["rows"]
    assert full["intervals"]["rouge1"] == [100, 100, 100]
    assert lora["rouge1"] == [50, 100]
    # Of two dialogues one has an invented name and number in one of two seeds.
    for side, wanted in ((lora, 25), (full, 0), (result["lead"], 0), (result["reference"], 0)):
        assert side["intervals"]["foreign_names"][0] == wanted
        assert side["intervals"]["foreign_numbers"][0] == wanted
    assert set(result["reference"]["intervals"]) == set(MEASURES)
    base = result["base"]["intervals"]["rouge1"][0]
    assert lora["gain"]["rouge1"][0] == pytest.approx(75 - base, abs=0.01)
    lead = result["lead"]["intervals"]["rouge1"][0]
    assert lora["lead"][0] == pytest.approx(75 - lead, abs=0.01)
    assert lora["share_of_full"][0] == pytest.approx((75 - base) / (100 - base), abs=0.001)
    assert "share_of_full" not in full
    assert result["per_dialogue"]["LoRA r 8"] == {
        "rouge1": [100, 0],
        "foreign_names": [0, 1],
    }
    assert result["per_dialogue"]["ids"] == ["a", "b"]


def test_what_is_read_is_what_the_table_scores(scripts: Any, tmp_path: Path) -> None:
    texts = scripts.pocket.to_read("minichat", TEST, ["x", "y"], ["z", "w"])
    (tmp_path / "a.json").write_text(json.dumps(texts))
    drawn = {row["id"]: row for row in scripts.reading.draw(tmp_path / "a.json", 2, 0)}
    assert [drawn["b"][side] for side in scripts.reading.SIDES] == ["y", "w", "The bus is late."]
    (tmp_path / "a.json").write_text(json.dumps(texts | {"weights": "0"}))
    with pytest.raises(scripts.reading.SheetError, match="of earlier weights"):
        scripts.reading.draw(tmp_path / "a.json", 2, 0)


def test_a_share_is_paired_and_has_an_interval(scripts: Any) -> None:
    whole = [float(i % 7) for i in range(200)]
    mean, low, high = scripts.pocket.share([0.5 * value for value in whole], whole)
    assert mean == low == high == 0.5
    half = [value * (i % 2) for i, value in enumerate(whole)]
    mean, low, high = scripts.pocket.share(half, whole)
    # The standard error of a ratio is that of a - mean b over the mean of b.
    rest = [a - mean * b for a, b in zip(half, whole, strict=True)]
    error = (sum(r * r for r in rest) / 200) ** 0.5 / 200**0.5 / (sum(whole) / 200)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert scripts.pocket.share(half, [-1.0, 1.0] * 100) is None


@pytest.mark.parametrize("name", ["base", "LoRA r 8", "full fine-tuning"])
def test_a_worker_summarizes_the_test_split(
    scripts: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bart(tmp_path / "bart")
    save_data(tmp_path / "chats")
    flags = ["--model", str(tmp_path / "bart"), "--data", str(tmp_path / "chats"), *SMALL]
    flags += ["--method", "full"] if name.startswith("full") else []
    job = {"name": name, "seed": 0, "flags": flags, "directory": str(tmp_path)}
    monkeypatch.setattr(sys, "argv", ["pocket.py", "--worker", json.dumps(job)])
    scripts.pocket.main()
    found = json.loads((tmp_path / "result.json").read_text())
    assert len(found["summaries"]) == 4
    assert (found["name"], "minutes" in found) == (name, name != "base")
    test = [Example(**row) for row in dialogues(4, 200)]
    assert set(scripts.pocket.scored(found["summaries"], test)) > set(MEASURES)


# The page -----------------------------------------------------------------------------------------

READERS = ["Ann, a person", "model X"]


def reading(**changes: Any) -> dict[str, Any]:
    sides = ("base", "finetuned", "reference")
    settings = {"data": "bookings", "split": "test", "weights": "abc", "readers": READERS}
    kappa = {"readable": {"agreed": 0.9, "kappa": 0.75}, "right": {"agreed": 1.0, "kappa": None}}
    counts = zip(sides, (11, 73, 95), strict=True)
    results = {s: {"readable": 99, "right": n, "right_or_in_part": n + 1} for s, n in counts}
    found = {"settings": settings, "n": 100, "void": False, "results": results}
    return found | {"agreement": kappa} | changes


def test_the_table_shows_a_reading_that_counts(scripts: Any, result: dict[str, Any]) -> None:
    ladder = scripts.ladder
    head, *rows = ladder.table(result, reading())
    titles = ["invented names", "invented numbers", "non-words", "repeats"]
    assert head[4:8] == titles
    assert head[8:] == ["readable, of 100", "right in part or all, of 100", "right in all, of 100"]
    names = ["pocket-bart as it ships", "LoRA r 8", "full fine-tuning"]
    names += ["the first 3 turns, copied", "reference"]
    assert [row[0] for row in rows] == names
    assert {len(row) for row in rows} == {len(head)}
    shown = [["99", "12", "11"], ["99", "74", "73"], [""] * 3, [""] * 3, ["99", "96", "95"]]
    assert [row[8:] for row in rows] == shown
    assert rows[1][4] == "25.0 [0.0, 50.0]"
    assert rows[4][2:4] == ["", ""]  # of references no ROUGE
    note = ladder.note(result, reading())
    share = "Share of full fine-tuning's gain: LoRA r 8 71% [33%, 100%]. The blind reading of 100"
    assert f"{share} dialogues by Ann, a person" in note
    assert "and by model X counts what both say" in note
    assert "90% (Cohen's kappa 0.75) of the summaries on whether they are readable" in note
    assert note.endswith("and 100% of the summaries on whether they are right.")
    result["rows"][0]["share_of_full"] = None
    note = ladder.note(result, reading())
    assert (
        "points. Full fine-tuning's gain may be zero, so no share of it is given. The blind" in note
    )


SETTINGS = reading()["settings"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"settings": SETTINGS | {"split": "validation"}}, "is a draft, of the validation split."),
        ({"settings": SETTINGS | {"weights": "other"}}, "is of other weights."),
        ({"void": True}, "is void: only 95 of the 100 references were found right in all."),
        (None, "reading.py sheet build/pocket/evaluation_bookings.json`."),
    ],
)
def test_any_other_reading_is_no_result(
    scripts: Any, result: dict[str, Any], changes: dict[str, Any] | None, why: str
) -> None:
    found = None if changes is None else reading(**changes)
    assert "readable" not in str(scripts.ladder.table(result, found))
    assert scripts.ladder.note(result, found).endswith(why)
    assert "agree" not in scripts.ladder.note(result, found)


def test_the_page_has_what_is_measured(scripts: Any, results: Path, result: dict[str, Any]) -> None:
    tables = scripts.tables
    text = "a\n<!-- table: ladder_minichat-hard -->\nold\n<!-- end -->\nb"
    commands = [f"`python benchmarks/{s}.py --data minichat-hard`" for s in ("grid", "pocket")]
    assert tables.render(text) == text.replace(
        "old", f"Not measured yet: {commands[0]}, then {commands[1]}."
    )
    assert "--data ../shared/data/samsum`" in tables.waiting("ladder_samsum")
    machine = scripts.common.machine()
    measured = {"date": "2000-01-01", "machine": machine} | result
    (results / "ladder_minichat-hard.json").write_text(json.dumps(measured))
    shown = tables.render(text)
    assert "| LoRA r 8 | 10 | 75.0 " in shown
    assert "Not read yet" in shown
    samsum = scripts.ladder.sentence({"data": "samsum"}, None)
    assert samsum.startswith("Not read: SAMSum's licence")
    assert "Measured 2000-01-01" in shown
    (results / "reading_minichat-hard.json").write_text(json.dumps(reading()))
    assert "readable, of 100" in tables.render(text)


def test_a_reading_is_stored_with_the_weights_it_is_of(
    scripts: Any, results: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers to a sheet that was made of other weights are refused."""
    module, evaluation = scripts.reading, tree / "evaluation.json"
    monkeypatch.setattr(module, "WEIGHTS", tree / "pocket-bart/model.safetensors")
    sides = {"base": "A.", "finetuned": "B.", "reference": "C."}
    rows = [{"id": str(i), "dialogue": f"Ann: {i}", **sides} for i in range(3)]
    about = {"data": "../shared/data/samsum", "split": "validation"}
    evaluation.write_text(json.dumps({**about, "examples": rows}))
    monkeypatch.setattr(sys, "argv", ["r", "sheet", str(evaluation), "--out", str(tree / "out")])
    module.main()
    filled = tree / "filled.txt"
    lines = (tree / "out/answers.txt").read_text().splitlines()
    answers = [line if line.startswith("#") else f"{line} y all" for line in lines]
    filled.write_text("\n".join(answers) + "\n")
    argv = ["r", "count", str(evaluation), str(filled), str(filled), "--readers", *READERS]
    monkeypatch.setattr(sys, "argv", argv)
    module.main()
    found = json.loads((results / "reading_samsum.json").read_text())
    weights = scripts.common.digest([tree / "pocket-bart/model.safetensors"])
    wanted = {"data": "samsum", "split": "validation", "weights": weights, "readers": READERS}
    assert found["settings"].items() >= wanted.items()
    (tree / "pocket-bart/model.safetensors").write_text("2")
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 2
