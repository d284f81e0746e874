"""Summaries of own chats: what is read, and that a stop anywhere changes nothing in the end."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import minilora
from minilora.__main__ import main
from minilora.files import write_file
from minilora.summarization import commands, predict
from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.data.batches import Encoded
from minilora.summarization.data.reading import Example
from minilora.summarization.errors import UserError
from minilora.summarization.evaluation.compare import Summary
from minilora.summarization.model import encoder_cache
from minilora.summarization.predict import Row, read_chats
from minilora.summarization.report import terminal
from minilora.summarization.settings import DataOptions, RunConfig
from tests.helpers import (
    GOOD,
    OTHER,
    SMALL,
    as_csv,
    as_jsonl,
    dialogues,
    save_bart,
    save_data,
    small_bart,
    write,
)  # fmt: skip

SETTINGS = {"run": "runs/x", "decoding": {"beams": 4}}


def texts(name: str | Path, **options: Any) -> list[str]:
    return [chat.dialogue for chat in read_chats(str(name), DataOptions(**options))[0]]


# Reading ------------------------------------------------------------------------------------------


def test_one_chat_or_several_in_a_text(tmp_path: Path, monkeypatch: Any) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfAnn: hi\r\n\r\nBob: a --- b\r\n")
    assert texts(path) == ["Ann: hi\n\nBob: a --- b"]
    content = b"---\nAnn: hi\n---  \r\n\nBob: hello\n----\nend\n---\n---\n"
    assert texts(write(path, content)) == ["Ann: hi", "Bob: hello\n----\nend"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert texts("-") == ["Ann: hi", "Bob: hello\n----\nend"]
    for nothing in (b"", b" \n", b"---\n \n---"):
        with pytest.raises(UserError, match=r"a\.txt: there is nothing to summarize"):
            texts(write(path, nothing))


def test_rows_need_no_summary(tmp_path: Path) -> None:
    rows = [{"id": row["id"], "text": row["dialogue"]} for row in (GOOD, OTHER)]
    for name, content in (("a.jsonl", as_jsonl(rows)), ("a.csv", as_csv(rows))):
        chats, notices = read_chats(str(write(tmp_path / name, content)), DataOptions())
        assert chats == [
            Example("a-1", GOOD["dialogue"], ""),
            Example("a-2", OTHER["dialogue"], ""),
        ]
        assert notices == ["columns read: text"]
    path = write(tmp_path / "a.jsonl", as_jsonl([*rows, {"text": ""}]))
    with pytest.raises(UserError, match="line 3: empty dialogue"):
        texts(path)
    assert len(texts(path, skip_bad_rows=True)) == 2


# Writing ------------------------------------------------------------------------------------------

LENGTHS = [5, 1, 9, 3, 3, 7, 2, 9, 4, 6]
CHATS = [Example(f"c{i % 9}", f"chat {i % 8} \u2028", "") for i in range(len(LENGTHS))]
ENCODED = [Encoded(c.id, [i] * n, []) for i, (c, n) in enumerate(zip(CHATS, LENGTHS, strict=True))]


class Model:
    """A summary names its chat and those beside it in the batch, on which the last bits depend."""

    def __init__(self, stop_at: int = -1, raises: type[BaseException] | None = None) -> None:
        self.calls, self.stop_at, self.raises = 0, stop_at, raises

    def __call__(self, batch: list[Encoded]) -> list[Row]:
        self.calls += 1
        if self.calls == self.stop_at:
            if self.raises:
                raise self.raises
            os.kill(os.getpid(), signal.SIGINT)
        beside = " ".join(str(row.source[0]) for row in batch)
        return [{"summary": f"{row.source[0]} of {beside}"} for row in batch]


def run(output: Path, model: Model, settings: dict[str, Any] = SETTINGS) -> int:
    return predict.write_summaries(output, CHATS, ENCODED, settings, 3, model)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The output of a call that was never stopped."""
    output, model = tmp_path / "whole.jsonl", Model()
    assert run(output, model) == len(CHATS)
    assert model.calls == 4
    assert not output.with_name("whole.jsonl.partial").exists()
    return output.read_bytes()


def test_rows_come_in_the_order_of_the_chats(whole: bytes) -> None:
    rows = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
    assert [(row["id"], row["dialogue"]) for row in rows] == [(c.id, c.dialogue) for c in CHATS]
    assert [row["summary"].split()[0] for row in rows] == [str(i) for i in range(len(CHATS))]
    assert rows[2]["summary"] == "2 of 2 7 5"  # batches of like length, the longest first


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_ctrl_c_lets_the_batch_end_and_the_next_call_goes_on(
    tmp_path: Path, whole: bytes, stop_at: int
) -> None:
    output, before = tmp_path / "out.jsonl", signal.getsignal(signal.SIGINT)
    assert run(output, Model(stop_at)) == 3 * stop_at
    assert signal.getsignal(signal.SIGINT) is before
    assert not output.exists()
    model = Model()
    assert run(output, model) == len(CHATS)
    assert model.calls == 4 - stop_at
    assert output.read_bytes() == whole


def test_an_error_loses_nothing_that_was_written(tmp_path: Path, whole: bytes) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(MemoryError):
        run(output, Model(3, MemoryError))
    model = Model()
    assert run(output, model) == len(CHATS)
    assert model.calls == 2
    assert output.read_bytes() == whole


@pytest.mark.slow
def test_a_kill_at_any_byte_changes_nothing_in_the_end(tmp_path: Path, whole: bytes) -> None:
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    run(output, Model(3))
    content = partial.read_bytes()
    for length in range(len(content)):
        output.unlink(missing_ok=True)
        partial.write_bytes(content[:length])
        assert run(output, Model()) == len(CHATS)
        assert output.read_bytes() == whole


def test_what_another_call_began_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(output, Model(1))
    with pytest.raises(UserError, match="was started with other decoding: remove it, or give --o"):
        run(output, Model(), SETTINGS | {"decoding": {"beams": 1}})
    with pytest.raises(UserError, match="was started with other chats"):
        predict.write_summaries(output, CHATS[:5], ENCODED[:5], SETTINGS, 3, Model())
    partial = tmp_path / "out.jsonl.partial"
    for damage in (b"[]\n", b"1\n", b"{broken\n"):
        partial.write_bytes(partial.read_bytes() + damage)
        with pytest.raises(UserError, match=r"out\.jsonl\.partial is damaged"):
            run(output, Model())
        partial.write_bytes(partial.read_bytes().removesuffix(damage))
    run(output, Model())
    with pytest.raises(UserError, match=r"--output .*out\.jsonl exists already"):
        run(output, Model())


# From the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run, and chats of unlike length."""
    folder = tmp_path_factory.mktemp("predict")
    save_bart(folder / "bart")
    data = save_data(folder / "data")
    argv = ["--model", str(folder / "bart"), "--data", str(data), *SMALL, "--rank", "3"]
    assert train_main([*argv, "--no-evaluate", "--output", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    for path in trained.glob("*.jsonl*"):
        path.unlink()
    chats = [{"id": row["id"], "text": row["dialogue"]} for row in dialogues(40)]
    write(trained / "chats.jsonl", as_jsonl(chats))
    monkeypatch.chdir(trained)
    return trained


def lines(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def test_many_chats(here: Path, capfd: Any) -> None:
    assert evaluate_main(["run", "--predict", "chats.jsonl", "--output", "out.jsonl"]) == 0
    assert capfd.readouterr() == (
        "summaries of 40 chats are in out.jsonl\n", "note: columns read: text\n"
    )  # fmt: skip
    chats, found = lines("chats.jsonl"), lines("out.jsonl")
    assert [(row["id"], row["dialogue"]) for row in found] == [(c["id"], c["text"]) for c in chats]
    assert len({row["summary"] for row in found}) > 3
    write(here / "chats.txt", "\n---\n".join(chat["text"] for chat in chats).encode())
    assert evaluate_main(["run", "--text", "chats.txt"]) == 0
    said = capfd.readouterr().out.removesuffix("\n").split("\n---\n")
    assert said == [terminal.format_summary({"summary": row["summary"]}) for row in found]
    # The command of the installed package; the base on request; a plain text.
    assert main(["predict", "run", "chats.txt", "--output", "base.jsonl", "--base"]) == 0
    both = lines("base.jsonl")
    assert [row["summary"] for row in both] == [row["summary"] for row in found]
    assert [row["id"] for row in both] == [str(n) for n in range(1, 41)]
    assert any(row["base"] != row["summary"] for row in both)


def test_a_summary_is_that_of_the_evaluation(here: Path) -> None:
    """The same model and decoding: summaries and bases are those that evaluate.py scores."""
    data = ["data/test.jsonl", "--output"]
    assert evaluate_main(["run", "--data", *data, "scores.json"]) == 0
    assert evaluate_main(["run", "--base", "--predict", *data, "out.jsonl"]) == 0
    scored = json.loads(Path("scores.json").read_text())["examples"]
    assert [(row["id"], row["base"], row["summary"]) for row in lines("out.jsonl")] == [
        (row["id"], row["base"], row["finetuned"]) for row in scored
    ]


def test_base_and_fine_tuned_model_share_the_states_of_their_encoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []

    def record(model: Any, _: Any, rows: list[Encoded], *how: Any) -> list[Summary]:
        given.append(how[-1])
        return [Summary("text", 1)] * len(rows)

    monkeypatch.setattr(commands, "summarize", record)
    digests, of_encoder = list[str](), encoder_cache.of_encoder

    def digest(*of: Any) -> str:
        digests.append(of_encoder(*of))
        return digests[-1]

    monkeypatch.setattr(encoder_cache, "of_encoder", digest)
    for targets, shared in ((r".*decoder.*q_proj", True), (["q_proj"], False)):
        model = small_bart().eval()
        minilora.inject(model, minilora.LoRAConfig(rank=2, targets=targets))
        models = commands.Models(model, None, None, None)  # type: ignore[arg-type]
        for base in (False, True):
            given.clear()
            rows = models.summaries(RunConfig(), ENCODED, base)
            assert [("base" in row) for row in rows] == [base] * len(ENCODED)
            assert [states is not None for states in given] == [shared and base] * (1 + base)
        if shared:
            assert given[0] is given[1]
            ids = torch.tensor([ENCODED[0].source])
            wanted = model.get_encoder()(input_ids=ids).last_hidden_state[0]
            kept = given[0].rows[tuple(ENCODED[0].source)]
            torch.testing.assert_close(kept, wanted, rtol=0, atol=1e-5)  # in another batch
            models.summaries(RunConfig(), ENCODED[:2], base=True)
            assert digests == [given[-1].encoder]  # once for all batches


@pytest.mark.parametrize("name", ["base", "precision", "device", "method"])
def test_summaries_of_another_base_or_precision_are_not_mixed(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, name: str
) -> None:
    base = save_bart(tmp_path / "other", seed=1) if name == "base" else here / "bart"
    argv = ["run/adapter", "--predict", "chats.jsonl", "--output", "out.jsonl", "--model"]
    written, calls = commands.Models.summaries, list[Any]()

    def stopped(models: Any, *how: Any) -> list[Row]:
        calls.append(how)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return written(models, *how)

    with monkeypatch.context() as patch:
        patch.setattr(commands.Models, "summaries", stopped)
        assert evaluate_main([*argv, "bart", "--evaluation-batch-size", "4"]) == 130
    begun = Path("out.jsonl.partial")
    if name != "base":
        first, *rest = begun.read_text().splitlines(keepends=True)
        begun.write_text(json.dumps(json.loads(first) | {name: "another"}) + "\n" + "".join(rest))
    capfd.readouterr()
    assert evaluate_main([*argv, str(base)]) == 2
    assert f"out.jsonl.partial was started with other {name}: remove it" in capfd.readouterr().err


def test_a_base_that_the_adapter_does_not_name_is_said(
    here: Path, tmp_path: Path, capfd: Any
) -> None:
    other = save_bart(tmp_path / "other", seed=1)
    write(here / "one.txt", b"Ann: hi")
    for more in (["--text", "one.txt"], []):
        capfd.readouterr()
        assert evaluate_main(["run/adapter", "--model", str(other), *more]) == 0
        said = f"note: the adapter was trained on {here / 'bart'}, but this model is {other}: are "
        assert said in capfd.readouterr().err
        assert evaluate_main(["run/adapter", *more]) == 0
        assert "trained on" not in capfd.readouterr().err


def test_a_finished_run_is_decoded_in_another_way(here: Path) -> None:
    for name, flags in (
        ("a", []),
        ("b", ["--max-length", "5"]),
        ("c", ["--prompt-before", "Bob: "]),
    ):
        argv = ["run", "--predict", "chats.jsonl", "--output", f"{name}.jsonl", *flags]
        assert evaluate_main(argv) == 0
    texts = {name: [row["summary"] for row in lines(f"{name}.jsonl")] for name in "abc"}
    assert texts["a"] != texts["b"]
    assert texts["a"] != texts["c"]
    assert evaluate_main(["run", "--max-length", "5", "--beams", "2", "--output", "s.json"]) == 0
    assert json.loads(Path("s.json").read_text())["generation"]["beams"] == 2


def test_a_length_beyond_the_positions_is_cut_and_said(here: Path, capfd: Any) -> None:
    write(here / "one.txt", b"Ann: hi")
    assert evaluate_main(["run", "--text", "one.txt", "--max-length", "500"]) == 0
    note = "note: --max-length 500 is cut to 64, the model's limit\n"
    assert capfd.readouterr().err == note


BAD = {
    "no output": (["--predict", "chats.jsonl"], "--predict requires --output FILE.jsonl"),
    "an output of texts": (["--text", "x", "--output", "y"], "--text does not take --output"),
    "both": (["--predict", "x", "--text", "y"], "not allowed with argument"),
    "a split": (["--predict", "x", "--output", "y", "--split", "test"], "does not take --split"),
    "data": (["--predict", "x", "--output", "y", "--data", "z"], "--predict summarizes chats and"),
    "output in a file": (
        ["--predict", "chats.jsonl", "--output", "chats.jsonl/out"],
        "chats.jsonl is a file: name another file",
    ),
    "scores in a file": (["--output", "chats.jsonl/out"], "chats.jsonl is a file: name another"),
    "a cache": (
        ["--predict", "x", "--output", "y", "--cache-encoder", "on"],
        "does not take --cache-encoder",
    ),
    "a preset": (["--preset", "notebook"], "run is a run and has its own settings: leave --preset"),
    "an unset variable": (["--predict", "", "--output", "y"], "--predict must not be empty"),
    "no chats": (["--predict", "no.jsonl", "--output", "y"], "no.jsonl: no such file"),
    "base of scores": (["--base"], "--base is for --text and --predict"),
    "files and data": (["--data", "x", "--test-file", "y"], "--data and --test-file exclude each"),
    "a prompt in Latin-1": (
        ["--text", "data/test.jsonl", "--prompt-before", "f\udcfcr"],
        "--prompt-before is not UTF-8 text",
    ),
    "no beams": (["--beams", "0"], "--beams must be above 0"),
    "lengths": (["--text", "data/test.jsonl", "--min-length", "99"], "need 0 <= --min-length"),
}


@pytest.mark.parametrize(("flags", "says"), BAD.values(), ids=BAD)
def test_bad_flags(here: Path, capfd: Any, flags: list[str], says: str) -> None:
    try:
        code: object = evaluate_main(["run", *flags])
    except SystemExit as exit:
        code = exit.code
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not Path("y").exists()


def test_a_command_calls_itself_as_it_was_called(here: Path, capfd: Any) -> None:
    for name, words, says in (
        ("evaluate", ["nowhere"], "nowhere: no such directory; name a run or an adapter"),
        (
            "predict",
            ["nowhere", "chats.jsonl", "--output", "y"],
            "nowhere: no such directory; name",
        ),
        ("predict", ["run", "chats.jsonl"], "--predict requires --output FILE.jsonl"),
        ("train", ["--data", "nothing.csv"], "nothing.csv: no such file or directory"),
    ):
        assert main([name, *words]) == 2
        assert capfd.readouterr().err.startswith(f"minilora {name}: {says}")
    for name in ("evaluate", "predict", "train"):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert capfd.readouterr().out.startswith(f"usage: minilora {name} ")


def test_standard_input_that_is_closed(here: Path, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert evaluate_main(["run", "--text", "-"]) == 2
    assert capfd.readouterr() == ("", "evaluate.py: -: standard input is closed\n")


def test_a_full_disk_loses_nothing(here: Path, capfd: Any, monkeypatch: Any) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.name == "out.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(path, content)

    monkeypatch.setattr(predict, "write_file", full)
    argv = ["run", "--predict", "chats.jsonl", "--output", "out.jsonl"]
    assert evaluate_main(argv) == 2
    says = "evaluate.py: cannot write to out.jsonl (No space left on device): nothing is lost: "
    assert says in capfd.readouterr().err
    monkeypatch.setattr(predict, "write_file", write_file)
    monkeypatch.setattr(commands.Models, "summaries", None)  # all of them are there already
    assert evaluate_main(argv) == 0
    assert len(lines("out.jsonl")) == 40


def test_predict_says_what_it_lacks(here: Path, capfd: Any) -> None:
    for argv in ([], ["run"], ["--output", "x", "run", "chats.jsonl"]):
        assert main(["predict", *argv]) == 2
        says = "minilora predict: give RUN and FILE before any flag\n"
        assert capfd.readouterr() == ("", says)
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "--help"])


@pytest.mark.slow
def test_ctrl_c_in_the_middle(here: Path) -> None:
    """Through the shell: exit code 130, and the same command goes on to the same output."""
    script = Path(__file__).parent.parent / "evaluate.py"
    common = [sys.executable, str(script), "run", "--predict", "chats.jsonl"]
    common += ["--evaluation-batch-size", "1", "--output"]

    def start(output: str) -> "subprocess.Popen[str]":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*common, output], env=os.environ, **pipes)  # type: ignore[call-overload]

    assert start("whole.jsonl").wait(120) == 0
    process, partial = start("out.jsonl"), Path("out.jsonl.partial")
    while not partial.exists() or partial.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.fullmatch(r"stopped after (\d+) of 40 chats; the same command continues\n", out)
    assert "Traceback" not in err
    assert 3 <= int(out.split()[2]) < 40
    assert start("out.jsonl").wait(120) == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not partial.exists()
