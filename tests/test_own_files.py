"""Files as people have them: tables of name, content, and what comes of it: rows, or a line."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from rouge_score.rouge_scorer import RougeScorer

from minilora.summarization.data import reading
from minilora.summarization.data.reading import Example
from minilora.summarization.errors import UserError
from minilora.summarization.evaluation.compare import Summary, compare
from minilora.summarization.evaluation.rouge import rouge
from minilora.summarization.report import runs, terminal
from minilora.summarization.report.page_dialogues import cards
from minilora.summarization.settings import DataOptions
from tests.helpers import EXPECTED, GOOD, OTHER, as_csv, as_json, as_jsonl, load, rows, write

ROWS = [GOOD, OTHER]


def separated(by: str, rows: list[dict[str, str]] = ROWS) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=by)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def renamed(dialogue: str, *summaries: str) -> list[dict[str, str]]:
    return [
        {"id": r["id"], dialogue: r["dialogue"]} | dict.fromkeys(summaries, r["summary"])
        for r in ROWS
    ]


def parquet(rows: list[Any]) -> Callable[[Path], object]:
    return lambda path: datasets.Dataset.from_list(rows).to_parquet(path)


def saved(rows: list[Any]) -> Callable[[Path], object]:
    return lambda path: datasets.Dataset.from_list(rows).save_to_disk(path)


TURNS = [{"speaker": "Ann", "text": "hi"}, {"speaker": "Bob", "text": "hello"}]
BYE = {"speaker": "Cy", "text": "bye"}
MESSAGES = [{"role": "Ann", "content": "hi"}, {"role": "Bob", "content": "hello"}]
CY = [{"role": "Cy", "content": "bye"}]
GPT = [{"from": "Ann", "value": "hi"}, {"from": "Bob", "value": "hello"}]
TEXTS = ["Ann: hi", "Bob: hello"]

Content = bytes | Callable[[Path], object]

# What is read as GOOD and OTHER.
READ: dict[str, tuple[str, Content]] = {
    "csv, semicolons": ("a.csv", separated(";")),
    "csv, tabs": ("a.csv", separated("\t")),
    "csv, bars": ("a.csv", separated("|")),
    "csv, commas in the text": ("a.csv", separated(";", [GOOD | {"x": "a, b, c, d, e"}, OTHER])),
    "csv, semicolons in the text": ("a.csv", separated(",", [GOOD | {"x": "a;b;c;d;e"}, OTHER])),
    "csv, Excel in Europe": ("a.csv", b"\xef\xbb\xbf" + separated(";")),
    "csv, Excel in Europe, with blank lines before": ("a.csv", b"\r\n\r\n" + separated(";")),
    "csv, an index without a name, from pandas": (
        "a.csv",
        b',id,dialogue,summary\n0,a-1,"Ann: hi\nBob: hello",They greet.\n'
        b"1,a-2,Cy: bye,Cy leaves.\n",
    ),
    "tsv": ("a.tsv", separated("\t")),
    "tsv, upper case": ("A.TSV", separated("\t")),
    "csv, gzipped": ("a.csv.gz", gzip.compress(separated(";"))),
    "tsv, gzipped": ("a.tsv.gz", gzip.compress(separated("\t"))),
    "json, gzipped": ("a.json.gz", gzip.compress(as_json(ROWS))),
    "jsonl, gzipped": ("a.jsonl.gz", gzip.compress(as_jsonl(ROWS))),
    "gzipped, and not called so": ("a.jsonl", gzip.compress(as_jsonl(ROWS))),
    "called gzipped, and not so, as browsers save it": ("a.jsonl.gz", as_jsonl(ROWS)),
    "data": ("a.json", as_json({"data": ROWS})),
    "data, indented": ("a.json", json.dumps({"data": ROWS}, indent=2).encode()),
    "data, after a version": ("a.json", as_json({"version": "1.0", "n": 2, "data": ROWS})),
    "data, after objects and lists": (
        "a.json",
        json.dumps({"meta": {"v": 1}, "tags": ["a"], "data": ROWS}, indent=1).encode(),
    ),
    "gzipped in two pieces": (
        "a.jsonl.gz",
        gzip.compress(as_jsonl([GOOD])) + gzip.compress(as_jsonl([OTHER])),
    ),
    "data, before a licence": ("a.json", as_json({"data": ROWS, "licence": {"name": "MIT"}})),
    "parquet": ("a.parquet", parquet(ROWS)),
    "save_to_disk": ("a", saved(ROWS)),
    "turns": ("a.json", as_json([GOOD | {"dialogue": TURNS}, OTHER])),
    "turns in a column called turns": (
        "a.jsonl",
        as_jsonl([{"id": "a-1", "turns": TURNS, "summary": "They greet."},
                  {"id": "a-2", "turns": ["Cy: bye"], "summary": "Cy leaves."}]),
    ),
    "messages": ("a.json", as_json([GOOD | {"dialogue": MESSAGES}, OTHER])),
    "messages in save_to_disk": (
        "a",
        saved([row | {"dialogue": said} for row, said in zip(ROWS, (MESSAGES, CY), strict=True)]),
    ),
    "from and value": ("a.json", as_json([GOOD | {"dialogue": GPT}, OTHER])),
    "texts": ("a.json", as_json([GOOD | {"dialogue": TEXTS}, OTHER])),
    "turns in parquet": (
        "a.parquet",
        parquet([GOOD | {"dialogue": TURNS}, OTHER | {"dialogue": [BYE]}]),
    ),
}  # fmt: skip


def make(path: Path, content: Content) -> Path:
    if isinstance(content, bytes):
        return write(path, content)
    content(path)
    return path


@pytest.mark.parametrize(("name", "content"), READ.values(), ids=READ)
def test_is_read(tmp_path: Path, name: str, content: Content, capfd: Any) -> None:
    path = make(tmp_path / name, content)
    capfd.readouterr()
    found, notices = reading.load_file(path, DataOptions())
    assert found == EXPECTED
    assert notices == (["columns read: turns, summary"] if b'"turns"' in bytes_of(content) else [])
    assert capfd.readouterr() == ("", ""), "a stray progress bar"


def bytes_of(content: Content) -> bytes:
    return content if isinstance(content, bytes) else b""


# Names of columns that are guessed, and what is said.
GUESSED: dict[str, tuple[bytes, str]] = {
    "text, target": (as_csv(renamed("text", "target")), "text, target"),
    "document, summary": (as_csv(renamed("document", "summary")), "document, summary"),
    "article, highlights": (as_csv(renamed("article", "highlights")), "article, highlights"),
    "source, reference": (as_csv(renamed("source", "reference")), "source, reference"),
    "capital letters": (as_csv(renamed("Dialogue", "Summary")), "Dialogue, Summary"),
    "both text and document": (
        as_csv([row | {"document": "x"} for row in renamed("text", "summary")]),
        "text, summary",
    ),
}


@pytest.mark.parametrize(("content", "said"), GUESSED.values(), ids=GUESSED)
def test_columns_are_guessed_and_said(tmp_path: Path, content: bytes, said: str) -> None:
    path = write(tmp_path / "a.csv", content)
    assert reading.load_file(path, DataOptions()) == (EXPECTED, [f"columns read: {said}"])


REFUSED: dict[str, tuple[str, Content, str]] = {
    "no column that fits": (
        "a.csv",
        b"chat;tldr\na;b\n",
        "line 2: no column 'dialogue'; columns found: chat, tldr; --dialogue-column NAME and "
        "--summary-column NAME say which to read",
    ),
    "a semicolon in a text of a csv, semicolons": (
        "a.csv",
        b"id;dialogue;summary\na;b;c\na;b; c;d\n",
        " line 3: 4 fields where the header has 3; text with ';' or line breaks needs quotes",
    ),
    "a tab in a text of a tsv": (
        "a.tsv",
        b"dialogue\tsummary\na\tb\tc\n",
        r" line 2: 3 fields where the header has 2; text with '\t' or line breaks needs quotes",
    ),
    "csv, a quote that does not end": (
        "a.csv",
        b'dialogue,summary\na,b\n"c,d\n',
        " line 3: not CSV (unexpected end of data); check the quotes",
    ),
    "tsv, a text that begins with a quote": (
        "a.tsv",
        b'dialogue\tsummary\n"Hi" he said\tb\n',
        r" line 2: not CSV ('\t' expected after '\"'); check the quotes".replace('\\"', '"'),
    ),
    "csv, a field too few": (
        "a.csv",
        b"dialogue,summary\nx\n",
        " line 2: 1 field where the header has 2; text with ',' or",
    ),
    "csv, an empty text": ("a.csv", b"dialogue;summary\na;\n", " line 2: empty summary"),
    "csv, one column": (
        "a.csv", b"dialogue\na\n", " line 2: no column 'summary'; columns found: dialogue; --dial"
    ),
    "csv, nothing but spaces": ("a.csv", b"  \n \n", ": no rows"),
    "csv, a header alone": ("a.csv", b"dialogue;summary\n", ": no rows"),
    "jsonl, gzipped, a bad line": (
        "a.jsonl.gz", gzip.compress(as_jsonl(ROWS) + b"{x\n"), " line 3: not JSON ("
    ),
    "json, gzipped, a bad row": (
        "a.json.gz", gzip.compress(as_json([GOOD, 5])), " row 2: expected an object with columns,"
    ),
    "save_to_disk, a number": (
        "a", saved([{"dialogue": 5, "summary": "x"}]), " row 1: column 'dialogue' is int, not text"
    ),
    "messages, no content": (
        "a.json",
        as_json([{"messages": [{"role": "Ann"}], "summary": "x"}]),
        " row 1: turn 1 of column 'messages' (text or content or value or utterance) is null, not",
    ),
    "the first row decides": (
        "a.jsonl",
        as_jsonl([*renamed("text", "summary"), *renamed("article", "summary")]),
        "line 3 (id a-1): no column 'text'; columns found: id, article, summary",
    ),
    "gzip, cut off": ("a.csv.gz", gzip.compress(separated(";"))[:-9], ": damaged or cut off"),
    "gzip, damaged": ("a.csv.gz", gzip.compress(separated(";"))[:20] + b"x" * 40, ": damaged or"),
    "gzip, not UTF-8": (
        "a.csv.gz",
        gzip.compress("dialogue;summary\né;x\n".encode("latin-1")),
        " line 2: not UTF-8",
    ),
    "parquet, not so": ("a.parquet", b"PAR1 no", ": cannot be read ("),
    "parquet, no rows": (
        "a.parquet",
        lambda path: datasets.Dataset.from_dict({"dialogue": [], "summary": []}).to_parquet(path),
        ": cannot be read (ValueError: Instruction",
    ),
    "parquet, a structure": (
        "a.parquet",
        parquet([GOOD | {"dialogue": {"turns": ["hi"]}}]),
        " row 1 (id a-1): column 'dialogue' is dict, not text",
    ),
    "gzipped twice": (
        "a.jsonl.gz",
        gzip.compress(gzip.compress(as_jsonl(ROWS))),
        " line 1: not UTF-8 (byte 0x8b",
    ),
    "gzip, text after it": (
        "a.jsonl.gz",
        gzip.compress(as_jsonl(ROWS)) + b"more",
        ": damaged or cut off (",
    ),
    "a zip": ("a.jsonl", b"PK\x03\x04" + bytes(40), " line 1: not JSON ("),
    "parquet, empty column": (
        "a.parquet",
        parquet([GOOD, OTHER | {"summary": None}]),
        " row 2 (id a-2): column 'summary' is null, not text",
    ),
    "save_to_disk, data gone": ("a/state.json", b"{}", ": cannot be read ("),
    "data, cut off": ("a.json", as_json({"data": ROWS})[:-1], " row 2: the list ends here"),
    "data, and an object after it": (
        "a.json", as_json({"data": ROWS}) + b" " + as_json({"data": ROWS}), ": the list ends here"
    ),
    "data, indented, and an object after it": (
        "a.json", 2 * json.dumps({"data": ROWS}, indent=1).encode(), ": the list ends here"
    ),
    "data, and a line after it": (
        "a.json", as_jsonl([{"data": ROWS}] * 2), " line 1: no column 'dialogue'; columns found: d"
    ),
    "data, and half an object": ("a.json", b'{"data": [] "a": {}}', ": the list ends here"),
    "data twice": (
        "a.json", b'{"data": ' + as_json(ROWS) + b', "data": []}', ": the list ends here"
    ),
    "a list, and a list after it": ("a.json", 2 * as_json(ROWS), ": the list ends here"),
    "data, bad in row 2": ("a.json", as_json({"data": [GOOD, {}]}), " row 2: no column 'dialogue'"),
    "a turn without a text": (
        "a.json",
        as_json([GOOD | {"dialogue": [TURNS[0], {"speaker": "Bob"}]}]),
        " row 1 (id a-1): turn 2 of column 'dialogue' (text or content or value or utterance) is ",
    ),
    "a turn that is a number": (
        "a.json",
        as_json([GOOD | {"dialogue": ["Ann: hi", 3]}]),
        " row 1 (id a-1): turn 2 of column 'dialogue' is int, not text",
    ),
    "a speaker that is a number": (
        "a.json",
        as_json([GOOD | {"dialogue": [{"speaker": 1, "text": "a"}]}]),
        " row 1 (id a-1): speaker of turn 1 of column 'dialogue' is int, not text",
    ),
    "a turn with two texts": (
        "a.json",
        b'[{"dialogue": [{"text": "a", "text": "b"}], "summary": "c"}]',
        " row 1: turn 1 of column 'dialogue' (text or content or value or utterance) occurs twice",
    ),
    "no turns": ("a.json", as_json([GOOD | {"dialogue": []}]), " row 1 (id a-1): empty dialogue"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "line"), REFUSED.values(), ids=REFUSED)
def test_is_refused(tmp_path: Path, name: str, content: Content, line: str, capfd: Any) -> None:
    path = make(tmp_path / name, content)
    path = path.parent if path.name == "state.json" else path
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        reading.load_file(path, DataOptions())
    assert line in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", ""), "a line of another library"


def test_bad_rows_can_be_left_out_where_others_remain(tmp_path: Path) -> None:
    for content, advice in ((as_jsonl([{}, {}]), False), (as_jsonl([GOOD, {}]), True)):
        with pytest.raises(UserError, match="no column") as caught:
            reading.load_file(write(tmp_path / "a.jsonl", content), DataOptions())
        assert ("--skip-bad-rows leaves such rows out" in str(caught.value)) == advice


# Several references -------------------------------------------------------------------------------

SEVERAL = {"dialogue": "A: b", "summary1": "Ann eats.", "summary2": "", "summary3": "Bob drinks."}


def test_several_references(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", as_csv([SEVERAL, SEVERAL | {"summary2": "Cy."}]))
    examples, notices = reading.load_file(path, DataOptions())
    assert examples == [
        Example("2", "A: b", "Ann eats.", ("Bob drinks.",)),
        Example("3", "A: b", "Ann eats.", ("Cy.", "Bob drinks.")),
    ]
    best = "training learns the first summary, ROUGE counts the best"
    assert notices == [f"columns read: dialogue, summary1, summary2, summary3: {best}"]
    with pytest.raises(UserError, match="line 2: empty summary"):
        reading.load_file(
            write(path, as_csv([SEVERAL | {"summary1": "", "summary3": " "}])), DataOptions()
        )


def test_a_blank_reference_is_none(tmp_path: Path) -> None:
    row = GOOD | {"summary2": " \n"}
    for name, content in (("a.jsonl", as_jsonl([row])), ("a.csv", as_csv([row]))):
        (example,), _ = reading.load_file(write(tmp_path / name, content), DataOptions())
        assert example.references == (GOOD["summary"],)


def test_references_of_later_rows_count(tmp_path: Path) -> None:
    several = [GOOD, OTHER | {"summary2": "b2", "target": "no"}, GOOD | {"summary3": "c3"}, OTHER]
    path = write(tmp_path / "a.jsonl", as_jsonl(several))
    examples, notices = reading.load_file(path, DataOptions())
    assert [example.more for example in examples] == [(), ("b2",), ("c3",), ()]
    assert [example.summary for example in examples] == [row["summary"] for row in several]
    best = "training learns the first summary, ROUGE counts the best"
    assert notices == [f"columns read: dialogue, summary, summary2, summary3: {best}"]
    # A usual name that comes later does not replace that of the first row.
    later = [{"dialogue": "a", "target": "b"}, {"dialogue": "c", "target": "d", "summary": "e"}]
    examples, _ = reading.load_file(write(path, as_jsonl(later)), DataOptions())
    assert [example.references for example in examples] == [("b",), ("d",)]


@pytest.mark.parametrize("columns", ["Text,text,Summary,summary", "text,Text,summary,SUMMARY"])
def test_of_columns_that_differ_in_case_the_one_of_this_name_is_read(
    tmp_path: Path, columns: str
) -> None:
    row = {name: f"in {name}" for name in columns.split(",")}
    path = write(tmp_path / "a.csv", as_csv([row]))
    (example,), _ = reading.load_file(path, DataOptions(dialogue_column="text"))
    assert (example.dialogue, example.references) == ("in text", ("in summary",))


def test_a_column_that_occurs_twice_and_is_not_read_does_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"id,id,dialogue,summary,x,x\n1,2,a,b,3,4\n")
    (example,), _ = reading.load_file(path, DataOptions())
    assert (example.id, example.dialogue, example.summary) == ("2", "a", "b")
    turn = b'{"text": "a", "time": 1, "time": 2}'
    path = write(tmp_path / "a.json", b'[{"dialogue": [%s], "summary": "c"}]' % turn)
    (example,), _ = reading.load_file(path, DataOptions())
    assert example.dialogue == "a"


def test_a_column_called_data_holds_turns(tmp_path: Path) -> None:
    """Lines of objects are JSON Lines, though the first alone would be a list in an object."""
    for turns in (TURNS, ["Ann: hi", "Bob: hello"]):
        content = as_jsonl([{"v": 1, "data": turns, "summary": "They greet."}] * 2)
        path = write(tmp_path / "a.jsonl", content)
        examples, _ = reading.load_file(path, DataOptions(dialogue_column="data"))
        assert [example.dialogue for example in examples] == [GOOD["dialogue"]] * 2


def test_one_of_several_references_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", as_csv([SEVERAL]))
    examples, _ = reading.load_file(path, DataOptions(summary_column="summary3"))
    assert examples == [Example("2", "A: b", "Bob drinks.")]


def test_rouge_counts_the_best_reference_measure_by_measure() -> None:
    texts = ["Ann eats a cake.", "Bob drinks tea with Ann at noon.", "Nobody came."]
    for text in ("Ann eats tea with Bob.", "Bob drinks.", "Came nobody?"):
        (best,) = rouge([text], [texts])
        alone = rouge([text] * 3, texts)
        assert best == {measure: max(row[measure] for row in alone) for measure in best}
        assert len({row["rouge1"] for row in alone}) > 1
        # rouge_score itself; these texts have one sentence, so that rougeLsum is rougeL.
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        scores = [scorer.score(reference, text) for reference in texts]
        for measure in ("rouge1", "rouge2", "rougeL"):
            assert best[measure] == 100 * max(score[measure].fmeasure for score in scores)


def test_several_references_are_in_the_evaluation_and_in_the_report(tmp_path: Path) -> None:
    examples = [
        Example("a", "A: b", "Ann eats.", ("Bob <drinks> tea.", "Bob.")),
        Example("b", "A: c", "Dee sleeps."),
    ]
    base = [Summary("Bob drinks coffee.", 5), Summary("", 2)]
    tuned = [Summary("Ann eats.", 4), Summary("Dee.", 3)]
    evaluation = compare(base, tuned, examples)
    content = evaluation.to_dict()
    several, one = content["examples"]
    assert (several["reference"], several["more_references"]) == ("Ann eats.", examples[0].more)
    assert "more_references" not in one
    assert several["rouge1_base"] == pytest.approx(200 * 2 / 6)  # Bob and drinks, of 3 + 3 words
    assert several["rouge1_finetuned"] == 100
    write(tmp_path / "config.json", b"{}")
    write(tmp_path / "evaluation.json", as_json(content))
    read = runs.read_report(tmp_path).evaluation
    assert read is not None
    assert read.examples == evaluation.examples
    assert terminal.format_examples(read, [0]).count("\n  or          Bob") == 2
    card, _ = cards(read.examples).split("</article>")[:2]
    for text in ("<dt>Reference<", "Ann eats.", "<dt>Or<", "Bob &lt;drinks&gt; tea.", ">Bob.<"):
        assert text in card
    # What ROUGE-1 counts is marked: the words of the reference that scores best.
    assert '<mark class="c0">Bob</mark> <mark class="c0">drinks</mark> coffee.' in card
    assert '<mark class="c1">Ann</mark> <mark class="c1">eats</mark>.' in card
    for wrong in ("text", [1], None):
        several["more_references"] = wrong
        write(tmp_path / "evaluation.json", as_json(content))
        with pytest.raises(UserError, match=r"examples\[0\]: more_references is not a list of str"):
            runs.read_report(tmp_path)


# Names of files -----------------------------------------------------------------------------------

COUNTS = {"train": 5, "validation": 3, "test": 2}
CONTENT = {"train": rows(5), "validation": rows(3, 10), "test": rows(2, 20)}

# Three names of a directory's files, for train, validation and test.
FOLDERS = {
    "dialogsum": ("dialogsum.train.jsonl", "dialogsum.dev.jsonl", "dialogsum.test.jsonl"),
    "other words": ("training.csv", "eval.csv", "testing.csv"),
    "words with others": ("samsum-train.json", "samsum_val.json", "SAMSUM TEST.json"),
    "gzipped": ("train.csv.gz", "valid.tsv.gz", "test.jsonl.gz"),
    "of the hub": (
        "data/train-00000-of-00001.parquet",
        "data/validation-00000-of-00001.parquet",
        "data/test-00000-of-00001-0123456789abcdef.parquet",
    ),
    "parquet": ("train.parquet", "dev.parquet", "test.parquet"),
    "saved as three": ("train", "validation", "test"),
}


def put(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    pack = gzip.compress if path.suffix == ".gz" else bytes
    if kind in ("csv", "tsv"):
        write(path, pack(separated("," if kind == "csv" else "\t", rows)))
    elif kind in ("json", "jsonl"):
        write(path, pack((as_json if kind == "json" else as_jsonl)(rows)))
    else:
        (parquet if kind == "parquet" else saved)(rows)(path)


@pytest.mark.parametrize("names", FOLDERS.values(), ids=FOLDERS)
def test_names_of_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, content in zip(names, CONTENT.values(), strict=True):
        put(tmp_path / name, content)
    write(tmp_path / "contest.csv", b"not the data")
    write(tmp_path / "README.md", b"text")
    found, notices = load(tmp_path)
    assert {split: len(examples) for split, examples in found.items()} == COUNTS
    assert notices == f"{tmp_path}: not read: contest.csv"


def test_a_saved_dictionary(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list(content) for name, content in CONTENT.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found, notices = load(tmp_path / "saved")
    assert {split: len(examples) for split, examples in found.items()} == COUNTS
    assert notices == ""


def test_shards_are_read_in_order_and_errors_name_theirs(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"train-0000{number}-of-00003.jsonl", rows(4, 4 * number))
    put(tmp_path / "test.jsonl", rows(2, 50))
    put(tmp_path / "val.jsonl", rows(2, 60))
    assert [example.id for example in load(tmp_path)[0]["train"]] == [f"r{i}" for i in range(12)]
    last = write(tmp_path / "train-00002-of-00003.jsonl", as_jsonl([*rows(2), {"dialogue": "x"}]))
    with pytest.raises(UserError, match=f"{last} line 3: no column 'summary'"):
        load(tmp_path)
    last.unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00003\.jsonl: 2 of the 3 train files are"):
        load(tmp_path)


def test_what_a_mac_leaves_beside_a_file_is_not_read(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", rows(9))
    put(tmp_path / "val.jsonl", rows(2, 20))
    write(tmp_path / "._train.jsonl", b"\0\5\26\7")
    write(tmp_path / ".notes.csv", b"x")
    found, notices = load(tmp_path)
    assert len(found["train"]) == 9
    assert "not read" not in notices


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("train.csv", "train_old.csv"), "train.csv and .*train_old.csv are both train data"),
        (
            ("train-00000-of-00002.csv", "train-00001-of-00003.csv"),
            "-of-00002.csv and .*-of-00003.csv are both train data",
        ),
        (("train_1.csv", "train_2.csv"), "train_1.csv and .*train_2.csv are both train data"),
        (("train-test-split.csv",), "train-test-split.csv: is it test or train data"),
        (("notes.csv",), "expected train, validation and test, .* found: notes.csv"),
    ],
)
def test_names_that_are_not_clear(tmp_path: Path, names: tuple[str, ...], line: str) -> None:
    for name in names:
        put(tmp_path / name, rows(3))
    with pytest.raises(UserError, match=line):
        load(tmp_path)


def test_files_named_one_by_one(tmp_path: Path) -> None:
    put(tmp_path / "a.tsv", rows(5))
    put(tmp_path / "b.parquet", rows(3, 10))
    put(tmp_path / "c.jsonl.gz", rows(2, 20))
    names = {"train_file": "a.tsv", "validation_file": "b.parquet", "test_file": "c.jsonl.gz"}
    files = {flag: str(tmp_path / name) for flag, name in names.items()}
    found, notices = load("bookings", **files)
    assert {split: len(examples) for split, examples in found.items()} == COUNTS
    assert notices == ""
    del files["validation_file"]
    found, notices = load("bookings", **files)  # --data has validation data, which are others
    assert [len(found[split]) for split in ("train", "validation", "test")] == [4, 1, 2]
    assert f"rows of {tmp_path / 'a.tsv'} are held out" in notices
    with pytest.raises(UserError, match=r"nothing\.csv: no such file"):
        load("bookings", train_file=str(tmp_path / "nothing.csv"))
    with pytest.raises(UserError, match=r"notes\.txt: not a data file"):
        load("bookings", train_file=str(tmp_path / "notes.txt"))


def test_rows_that_stand_in_training_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", rows(9))
    put(tmp_path / "validation.jsonl", rows(3, 100))
    put(tmp_path / "test.jsonl", rows(4, 7))
    assert load(tmp_path)[1] == "test: 2 dialogues of 4 are also in the training data"
    assert load(tmp_path, "test")[1] == ""  # training is not read for that
