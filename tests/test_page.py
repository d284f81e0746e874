"""report.html: what it is made of, what it says of unfinished and damaged runs, and its plots."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora.__main__ import main
from minilora.peft_format.apply import adapter_of
from minilora.summarization import files
from minilora.summarization.data.reading import Example
from minilora.summarization.evaluation import compare, rouge
from minilora.summarization.report import page, page_curves, page_dialogues, plots, runs
from minilora.summarization.report.page_dialogues import shared_words
from minilora.summarization.settings import RunConfig
from tests.conftest import adapted
from tests.helpers import as_jsonl

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{ & \x00 \ud83d"
REFERENCES = [
    Example("a", "Ann: shall we go to the sea?\nBob: yes, yes", "Ann and Bob go to the sea."),
    Example(HOSTILE, f"Eve: {HOSTILE}\n{HOSTILE}: x\n\n" + "long" * 200, f"Eve attacks {HOSTILE}."),
    Example("c", "安娜: 你好", "安娜问好。"),
    Example("d", "Dee: meetings at 9", "Dee meets at 9."),
]
BASE = ["Ann asks Bob.", f"script {HOSTILE}", "安娜", "Dee meets at 9."]
TUNED = ["Ann and Bob and Ann go.", "Eve attacks.", "", "Dee is meeting at nine."]


def log(steps: int = 30, end: bool = True) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"kind": "start", "trainable": 1_500, "total": 3_000_000}]
    for step in range(1, steps + 1):
        records.append({"kind": "step", "step": step, "loss": 4 - step / steps, "seconds": 0.5})
        if step % 10 == 0:
            scores = {"rouge1": 20.0 + step, "rouge2": 5.0, "rougeL": 15.0, "loss": 3.5}
            records.append({"kind": "validation", "step": step, "epoch": step // 10} | scores)
    records.insert(5, {"kind": "a kind of tomorrow", "seconds": None})
    records[3]["loss"] = None  # not finite
    return records + ([{"kind": "end", "seconds": 200.0, "peak_bytes": 3 * 2**20}] if end else [])


def save_run(directory: Path, *, end: bool = True, scored: bool = True, **config: Any) -> Path:
    """A run's files, with an adapter of random numbers and texts that try to break out."""
    directory.mkdir(parents=True)
    settings = RunConfig().to_dict() | {"model": HOSTILE, HOSTILE: HOSTILE} | config
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "log.jsonl").write_bytes(as_jsonl(log(end=end)))
    minilora.write_adapter(adapter_of(adapted("bart")), directory / "adapter")
    if scored:
        base, tuned = ([compare.Summary(t, len(t)) for t in texts] for texts in (BASE, TUNED))
        compared = compare.compare(base, tuned, REFERENCES, data=HOSTILE, split="test")
        files.write_json(directory / "evaluation.json", compared.to_dict())
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("page") / "a <b>run")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return page.render([runs.read_report(run)])


class Reader(HTMLParser):
    """Every element, and all text outside style and script."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.open}:
            self.text += data


# The page -----------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_needs_nothing_else(html: str) -> None:
    reader = Reader(html)
    assert reader.open == []
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", html)
    names = [name for _, attributes in reader.tags for name in attributes]
    assert not {"src", "srcset", "style", "action", "background"} & {*names}
    assert not [name for name in names if name.startswith("on")]
    links = [attributes["href"] for tag, attributes in reader.tags if tag == "a"]
    assert links
    assert all(link and link.startswith("#") for link in links)
    identifiers = {attributes.get("id") for _, attributes in reader.tags}
    assert {str(link)[1:] for link in links} <= identifiers
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == tags.count("style") == 1
    assert not {"link", "img", "iframe", "base", "form", "object"} & {*tags}
    assert "url(" not in html
    assert "@import" not in html


def test_hostile_texts_stay_texts(html: str) -> None:
    reader = Reader(html)
    readable = HOSTILE.replace("\x00", "\ufffd").replace("\ud83d", "\ufffd")
    assert reader.text.count(readable) >= 4  # a title, a dialogue, a setting and its value
    assert "<b>run" in reader.text
    assert html.count("<script") == 1
    assert "<img" not in html


@pytest.mark.slow
@given(st.text())
def test_whatever_is_escaped_reads_back_and_holds_no_markup(text: str) -> None:
    for source in (f"<p>{plots.escape(text)}</p>", f'<p title="{plots.escape(text)}"></p>'):
        reader = Reader(source)
        assert [tag for tag, _ in reader.tags] == ["p"]
        found = reader.tags[0][1].get("title") if "title" in source[:9] else reader.text
        assert re.sub("\ufffd", "", found or "") == re.sub(
            "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffd-\uffff]", "", text
        )


def test_what_was_trained_and_gained_is_said(html: str) -> None:
    text = Reader(html).text
    for words in (
        "1,500",
        "of 3,000,000",
        "0.05%",
        "3.3 min",
        "3 MiB",
        "in 3 epochs",
        "4 dialogues",
    ):
        assert words in text, words
    assert "ROUGE-1 rose on 1 dialogues, fell on 2 and stayed on 1" in text
    assert "unfinished" not in text
    assert "Not scored" not in text


def test_an_unfinished_run_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", end=False, scored=False, model="pocket-bart")
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "st')  # the process died
    text = Reader(page.render([runs.read_report(run)])).text
    assert "the log ends at step 30" in text
    assert f"python train.py --resume {run}" in text
    assert f"python evaluate.py {run} --output {run}/evaluation.json" in text
    assert "not scored yet" in text
    for name in ("log.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        (run / name).unlink()
    (run / "adapter").rmdir()
    text = Reader(page.render([runs.read_report(run)])).text  # nothing but a config.json
    assert "Not trained yet" in text
    assert "No adapter yet" in text


def test_several_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = save_run(tmp_path / "other", rank=4)
    short = save_run(tmp_path / "short", scored=False)
    elsewhere = save_run(tmp_path / "elsewhere")
    found = json.loads((elsewhere / "evaluation.json").read_text())
    found["examples"] = found["examples"][:1]
    (elsewhere / "evaluation.json").write_text(json.dumps(found))
    source = page.render([runs.read_report(r) for r in (run, other, short, elsewhere)])
    reader = Reader(source)
    assert reader.open == []
    assert "4 runs, side by side" in reader.text
    assert "short: not scored" in reader.text
    assert "Scored on other dialogues, so not shown here: elsewhere" in reader.text
    assert sum("data-gain" in attributes for _, attributes in reader.tags) == len(REFERENCES)
    differing = re.findall(r'<strong class="differs"><code>(.*?)</code>', source)
    assert differing == ["8", "4", "8", "8"]


# Reading ------------------------------------------------------------------------------------------


def test_singular_values_are_those_of_the_update(run: Path) -> None:
    adapter = minilora.read_adapter(run / "adapter")
    for spectrum in runs.read_report(run).spectra:
        A, B = (tensor.double() for tensor in adapter.pair(spectrum.module))
        update = adapter.scale_of(spectrum.module) * B @ A
        wanted = torch.linalg.svdvals(update)
        rank = A.shape[0]
        assert spectrum.shape == tuple(update.shape)
        # both in float64; what stands after the rank is rounding
        torch.testing.assert_close(torch.tensor(spectrum.values).double(), wanted[:rank])
        assert wanted[rank:].max() < 1e-12
        assert math.isclose(spectrum.norm, update.norm().item(), rel_tol=1e-9)
        assert 1 <= spectrum.stable_rank <= rank


DAMAGE: dict[str, tuple[str, bytes | None, str]] = {
    "no config": ("config.json", None, "is not a run: it has no config.json"),
    "half a config": ("config.json", b'{"rank"', "config.json: cannot be read as JSON"),
    "a list for a config": ("config.json", b"[]", "config.json: holds no object"),
    "bytes for a config": ("config.json", b"\xff\xfe\x00", "config.json: cannot be read as JSON"),
    "nested too deep": ("config.json", b"[" * 99_999, "config.json: cannot be read as JSON"),
    "a bad line": ("log.jsonl", b'{"kind": "start"\n{}\n', "log.jsonl line 1: cannot be read"),
    "no record": ("log.jsonl", b"3\n", "log.jsonl line 1: is not a record"),
    "no total": ("log.jsonl", b'{"kind": "start", "trainable": 1}\n', "line 1: has no total"),
    "a text for a number": (
        "log.jsonl",
        b'{"kind": "step", "step": 1, "loss": "<b>"}\n',
        "line 1: loss is '<b>', not a finite number",
    ),
    "not a number": ("log.jsonl", b'{"kind": "step", "step": NaN}\n', "step is nan"),
    "no loss": ("log.jsonl", b'{"kind": "validation", "step": 1, "epoch": []}\n', "epoch is []"),
    "no seconds": ("log.jsonl", b'{"kind": "end", "peak_bytes": 1}\n', "line 1: has no seconds"),
    "half an evaluation": ("evaluation.json", b"{", "evaluation.json: cannot be read as JSON"),
    "no examples": ("evaluation.json", b"{}", "evaluation.json: has no examples"),
    "an example that is none": ("evaluation.json", b'{"examples": [1]}', "examples[0] is no"),
    "an example without a text": (
        "evaluation.json",
        b'{"examples": [{"id": "a", "dialogue": 3}]}',
        "examples[0]: dialogue is not a text",
    ),
    "a damaged adapter": ("adapter/adapter_model.safetensors", b"x", "adapter_model.safetensors"),
    "half an adapter": ("adapter/adapter_config.json", None, "adapter_config.json"),
}


@pytest.mark.parametrize(("name", "content", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_gives_one_line(
    tmp_path: Path, capsys: Any, name: str, content: bytes | None, says: str
) -> None:
    run = save_run(tmp_path / "run")
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    assert main(["report", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("minilora report: ")
    assert says in err
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("key", ["intervals", "base", "finetuned"])
def test_an_evaluation_without_scores_gives_one_line(run: Path, tmp_path: Path, key: str) -> None:
    found = json.loads((run / "evaluation.json").read_text())
    del found[key]
    broken = save_run(tmp_path / "run")
    (broken / "evaluation.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"evaluation\.json: {key}.* has no "):
        runs.read_report(broken)


def test_the_command_writes_into_the_run_or_where_it_is_told(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(Path("a"))
    save_run(Path("b"), scored=False)
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == f"written to {Path('a/report.html')}\n"
    first = Path("a/report.html").read_bytes()
    assert main(["report", "a", "--output", "new/x.html"]) == 0
    assert Path("new/x.html").read_bytes() == first  # the same run gives the same page
    assert main(["report", "a", "b"]) == 0
    assert b"2 runs, side by side" in Path("report.html").read_bytes()
    capsys.readouterr()
    for argv, says in (
        (["nothing"], "nothing: no such directory"),
        (["a", "--output", "new"], "--output new is a directory"),
        (["a", "--output", "a/config.json/x.html"], "config.json"),
    ):
        assert main(["report", *argv]) == 2
        assert says in capsys.readouterr().err


# Words and plots ----------------------------------------------------------------------------------

WORDS = st.lists(
    st.sampled_from(["Ann", "meets", "meeting", "Bob's", "9", "the", "The", "café,", ".", "安娜"]),
    max_size=9,
)


@given(WORDS.map(" ".join), WORDS.map(" ".join))
def test_marked_words_are_those_that_rouge_counts(text: str, reference: str) -> None:
    shared = shared_words(text, reference)
    assert len(shared) == len(shared_words(reference, text))
    words = sum(len(page_dialogues._words(side)) for side in (text, reference))
    f1 = 200 * len(shared) / words if words else 0.0
    assert f1 == pytest.approx(rouge.rouge([text], [reference])[0]["rouge1"], abs=1e-9)


def test_marks_stand_on_the_words() -> None:
    text, reference = "Dee is meeting, meeting Ann", "Ann meets Dee"
    assert [text[a:b] for a, b in shared_words(text, reference)] == ["Dee", "meeting", "Ann"]
    spans = dict.fromkeys(shared_words("a <b> a", "b"), "c1")
    assert page_dialogues._marked("a <b> a", spans) == 'a &lt;<mark class="c1">b</mark>&gt; a'


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(3, 9))
def test_ticks_are_round_and_cover_the_range(low: float, length: float, most: int) -> None:
    found = plots.ticks(low, low + length, most)
    slack = 1e-6 * max(abs(low), low + length, 1e-6)  # rounded; and as good as equal
    assert found[0] <= low + slack
    assert found[-1] >= low + length - slack
    assert 2 <= len(found) <= most + 1
    assert found == sorted(set(found))


def test_a_point_lands_where_the_axes_say() -> None:
    frame = plots.Frame(200, 100, [0, 10], [0, 5], left=50, top=10, right=50, bottom=40)
    assert frame.at(0, 0) == (50, 60)
    assert frame.at(10, 5) == (150, 10)
    assert frame.at(5, 2.5) == (100, 35)


def test_a_chart_of_a_single_point_and_of_equal_values() -> None:
    for points in ([(1.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)]):
        svg = plots.line_chart("t", [plots.Series("<s>", points)], "x", "y")
        assert "nan" not in svg
        assert Reader(svg).open == []


def test_a_smoothed_line_is_a_mean_of_neighbours() -> None:
    points = [(float(x), float(x % 2)) for x in range(1, 61)]
    size, smooth = page_curves._smooth(points)
    assert size == 4
    assert {y for _, y in smooth} == {0.5}
    assert (smooth[0][0], smooth[-1][0]) == (2.5, 58.5)
    assert len(page_curves._smooth(points * 100)[1]) <= 200
    assert page_curves._smooth([]) == (1, [])
