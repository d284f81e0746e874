"""report.html: what it is made of, what it says of unfinished and damaged runs, and its plots."""

import json
import re
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora.__main__ import main
from minilora.inject import lora_layers
from minilora.methods import AdaLoRAConfig
from minilora.peft_format.apply import adapter_of
from minilora.summarization import files
from minilora.summarization.data.reading import Example
from minilora.summarization.evaluation import compare, rouge
from minilora.summarization.report import (
    figures,
    markup,
    page,
    page_charts,
    page_dialogues,
    page_ranks,
    runs,
    terminal,
)
from minilora.summarization.report.page_dialogues import shared_words
from minilora.summarization.settings import RunConfig
from tests.conftest import adapted, tiny_bart
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


PROBLEMS = ["in the first 3 steps, no gradient: a.<b>.lora_A", "in the first 3 steps, not moved: c"]


def log(steps: int = 30, end: bool = True) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"kind": "start", "trainable": 1_500, "total": 3_000_000}]
    for step in range(1, steps + 1):
        records.append({"kind": "step", "step": step, "loss": 4 - step / steps, "seconds": 0.5})
        records[-1]["learning_rate"] = 1e-3 * (1 - step / steps)
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
    return page.render(runs.read_report(run))


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


def test_what_the_first_steps_showed_is_on_the_page(run: Path, tmp_path: Path) -> None:
    assert "first 3 steps" not in page.render(runs.read_report(run))
    for problems, shown in ((PROBLEMS, 2), ([], 0), (None, 0), ("x", 0), ([3], 1)):
        directory = tmp_path / f"run{shown}{problems is None}{len(str(problems))}"
        save_run(directory)
        record = {"kind": "check", "step": 3, "problems": problems}
        with (directory / "log.jsonl").open("ab") as file:
            file.write(as_jsonl([record]))
        assert page.render(runs.read_report(directory)).count('<p class="notice">') == shown
    text = page.render(runs.read_report(tmp_path / f"run2False{len(str(PROBLEMS))}"))
    assert "no gradient: a.&lt;b&gt;.lora_A" in text


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
    for source in (f"<p>{markup.escape(text)}</p>", f'<p title="{markup.escape(text)}"></p>'):
        reader = Reader(source)
        assert [tag for tag, _ in reader.tags] == ["p"]
        found = reader.tags[0][1].get("title") if "title" in source[:9] else reader.text
        assert re.sub("\ufffd", "", found or "") == re.sub(
            "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffd-\uffff]", "", text
        )


def test_two_validations_in_an_epoch_are_one_epoch(run: Path) -> None:
    """Of a run whose --max-steps was raised."""
    read = runs.read_report(run)
    two = tuple(record | {"epoch": 1} for record in read.validations[:2])
    assert "in 1 epoch<" in page.render(replace(read, validations=two))


def test_words_of_another_language_are_said_to_be_compared_with_english() -> None:
    german = Example(
        "a", "Anna: Das Meeting wurde gestern verschoben.", "Das Treffen wurde verlegt."
    )
    english = Example("b", "Ann: hi Bob", "Ann greets Bob.")
    for example, noted in ((german, True), (english, False)):
        side = [compare.Summary(example.summary, 5)]
        evaluation = compare.compare(side, side, [example])
        assert bool(figures.nonsense_note(evaluation)) is noted
        assert ("compared with English" in terminal.format_comparison(evaluation)) is noted


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
    assert "ROUGE-1 rose on 1 dialogue, fell on 3 and stayed on 0" in text  # the Chinese one too
    assert "Learning rate" in text
    assert "not finished" not in text
    assert "Not scored" not in text


def test_an_unfinished_run_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", end=False, scored=False, model="pocket-bart")
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "st')  # the process died
    text = Reader(page.render(runs.read_report(run))).text
    assert "the log ends at step 30" in text
    assert f"python -m minilora train --resume {run}" in text
    assert f"python -m minilora train --resume {run} --evaluate" in text
    assert "not scored yet" in text
    for name in ("log.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        (run / name).unlink()
    (run / "adapter").rmdir()
    text = Reader(page.render(runs.read_report(run))).text  # nothing but a config.json
    assert "Not trained yet" in text


# Reading ------------------------------------------------------------------------------------------


DAMAGE: dict[str, tuple[str, bytes | None, str]] = {
    "no config": ("config.json", None, "is not a run: it has no config.json"),
    "a model's config": ("config.json", b'{"model_type": "bart"}', "is a model, not a run"),
    "half a config": ("config.json", b'{"rank"', "config.json: cannot be read as JSON"),
    "a list for a config": ("config.json", b"[]", "config.json: does not contain a JSON object"),
    "bytes for a config": ("config.json", b"\xff\xfe\x00", "config.json: cannot be read as JSON"),
    "nested too deep": ("config.json", b"[" * 99_999, "config.json: cannot be read as JSON"),
    "a bad line": ("log.jsonl", b'{"kind": "start"\n{}\n', "log.jsonl line 1: cannot be read"),
    "no record": ("log.jsonl", b"3\n", "log.jsonl line 1: is not a JSON object with a kind"),
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
        "examples[0]: dialogue is not a string",
    ),
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
    capsys.readouterr()
    for argv, says in (
        (["nothing"], "nothing: no such directory"),
        (["a", "--output", "new"], "--output new is a directory"),
        (["a", "--output", "a/config.json/x.html"], "config.json"),
        (["a", "--output", "a/config.json"], "must end in .html"),
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
    tokenizer = rouge.tokenizer_for([reference])
    shared = shared_words(text, reference, tokenizer)
    assert len(shared) == len(shared_words(reference, text, tokenizer))
    words = sum(len(rouge.words(side, tokenizer)) for side in (text, reference))
    f1 = 200 * len(shared) / words if words else 0.0
    assert f1 == pytest.approx(rouge.rouge([text], [reference])[0]["rouge1"], abs=1e-9)


def test_marks_stand_on_the_words() -> None:
    text, reference = "Dee is meeting, meeting Ann", "Ann meets Dee"
    assert [text[a:b] for a, b in shared_words(text, reference, "rouge_score")] == [
        *("Dee", "meeting", "Ann")
    ]
    found = page_dialogues._marked("a <b> a", ["b"], "rouge_score", "c1")
    assert found == 'a &lt;<mark class="c1">b</mark>&gt; a'


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(3, 9))
def test_ticks_are_round_and_cover_the_range(low: float, length: float, most: int) -> None:
    found = page_charts.ticks(low, low + length, most)
    slack = 1e-6 * max(abs(low), low + length, 1e-6)  # rounded; and as good as equal
    assert found[0] <= low + slack
    assert found[-1] >= low + length - slack
    assert 2 <= len(found) <= most + 1
    assert found == sorted(set(found))


def test_a_point_lands_where_the_axes_say() -> None:
    assert [page_charts.place(x, [0, 4, 10], 50, 150) for x in (0, 10, 5)] == [50, 150, 100]
    assert [page_charts.place(y, [0, 5], 60, 10) for y in (0, 5, 2.5)] == [60, 10, 35]


def test_a_chart_of_a_single_point_and_of_equal_values() -> None:
    for points in ([(1.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)]):
        svg = page_charts.line_chart("t", [page_charts.Series("<s>", points, "c0")])
        assert "nan" not in svg
        assert Reader(svg).open == []


def test_a_smoothed_line_is_a_mean_of_neighbours() -> None:
    points = [(float(x), float(x % 2)) for x in range(1, 61)]
    smooth = page_charts._moving_mean(points, 57)
    assert len(smooth) == 57  # of four each
    assert {y for _, y in smooth} == {0.5}
    assert (smooth[0][0], smooth[-1][0]) == (2.5, 58.5)
    assert len(page_charts._thin(points * 100, 200)) == 200
    assert page_charts._moving_mean([], 200) == []


def test_a_chart_of_many_steps_takes_no_more_memory_than_they_do() -> None:
    points = [(float(x), 1.0) for x in range(1, 30_001)]
    tracemalloc.start()
    smooth = page_charts._moving_mean(points, 200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(smooth) <= 200
    assert (smooth[0], smooth[1][0] > 100) == ((1000.5, 1.0), True)
    assert peak < 1_000_000  # all windows of 2,000 points together: 450 MB


# AdaLoRA's ranks ----------------------------------------------------------------------------------


def adalora_run(directory: Path) -> Path:
    """A run whose adapter has another rank in each module."""
    save_run(directory, method="adalora")
    model = tiny_bart()
    minilora.inject(model, AdaLoRAConfig(rank=6, target_rank=2, total_steps=9))
    with torch.no_grad():
        for i, layer in enumerate(lora_layers(model).values()):
            layer.lora_E[: i % 7] = 1
    minilora.save_adapter(model, directory / "adapter")
    return directory


def test_the_ranks_of_adalora_are_a_picture(tmp_path: Path) -> None:
    run = runs.read_report(adalora_run(tmp_path / "run"))
    assert run.ranks["model.encoder.layers.0.self_attn.v_proj"] in range(7)
    assert sorted(set(run.ranks.values())) == list(range(min(7, len(run.ranks))))
    grid = page_ranks.rank_grid(run.ranks)
    assert grid in page.render(run)
    assert grid.count("<rect") == len(run.ranks)
    shown = [int(n) for n in re.findall(r'middle">(\d+)</text>', grid)]
    columns = 2  # two layers of the encoder; the decoder has one
    assert sorted(shown[columns:]) == sorted(run.ranks.values())
    assert "AdaLoRA of mean rank 8" in page.render(run)


def test_without_adalora_there_is_no_such_picture(html: str, run: Path) -> None:
    assert runs.read_report(run).ranks == {}
    assert page_ranks.rank_grid({}) == ""
    assert "Ranks that training chose" not in html


@given(
    ranks=st.dictionaries(
        st.from_regex(r"\A[a-c<&.]{0,3}[0-9]{0,2}[a-c.]{0,3}\Z"), st.integers(0, 300), max_size=9
    )
)
def test_any_names_and_ranks_make_a_picture(ranks: dict[str, int]) -> None:
    grid = page_ranks.rank_grid(ranks)
    assert bool(grid) == bool(ranks)
    assert "nan" not in grid
    assert not re.search(r"<[a-c&.]", grid)  # what is in a name is text
