"""The lessons run, their claims hold and can fail, their exercises can be solved and are gaps."""

import ast
import base64
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.forks import fork

LESSONS = Path(__file__).resolve().parents[1] / "lessons"
PATHS = sorted(LESSONS.glob("[0-9]_*.py"))
LONG = ("7_which_layers_which_rank",)  # a minute of training
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@pytest.fixture
def classroom(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a lesson finds when it is run from its own folder, without a screen."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.syspath_prepend(str(LESSONS))
    plt = pytest.importorskip("matplotlib.pyplot", reason="lessons need the extra `plot`")
    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.nightly) if path.stem in LONG else path
        for path in PATHS
    ],
    ids=lambda path: path.stem,
)
def test_a_lesson_runs_and_its_claim_holds(
    path: Path, classroom: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib.pyplot as plt

    runpy.run_path(str(path))  # its claim is asserted inside
    figures = [plt.figure(number) for number in plt.get_fignums()]
    assert figures
    for axis in (axis for figure in figures for axis in figure.axes):
        assert axis.get_xlabel(), path.name
        assert axis.get_ylabel(), path.name
    assert "the claim fails, as it should" in capsys.readouterr().out


@each
def test_a_lesson_has_all_that_a_lesson_has(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    ast.parse(source)
    for part in ("**Question.**", "## The math", "**What to see.**", "## The claim"):
        assert part in source, part
    exercises = source[source.index("## Exercises") :]
    number = path.name[0]
    assert re.findall(r"^# ([0-9])\. ", exercises, re.MULTILINE) == ["1", "2", "3"]
    assert f"exercises/test_lesson_{number}.py" in exercises
    stubs = ast.parse((LESSONS / "exercises" / f"lesson_{number}.py").read_text(encoding="utf-8"))
    asked = [node.name for node in stubs.body if isinstance(node, ast.FunctionDef)]
    assert len(asked) == 3
    assert [name for name in asked if f"`{name}`" not in exercises] == []


@each
def test_the_notebook_is_this_lesson_with_its_outputs(path: Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="notebooks need the extra `lessons`")
    stored = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in stored["cells"]]
    now = jupytext.read(path, fmt="py:percent")
    assert cells == [(c.cell_type, c.source) for c in now.cells], "run `make lessons`"
    outputs = [output for cell in stored["cells"] for output in cell.get("outputs", [])]
    kinds = {(o["output_type"], o.get("name")) for o in outputs}  # no errors, no warnings
    assert kinds <= {("stream", "stdout"), ("display_data", None)}
    images = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert images
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)


def exercise_outcomes(tmp_path: Path, *flags: str) -> dict[str, str]:
    """What pytest says of each exercise's test: `passed`, or the first line of the failure."""
    report = tmp_path / "report.xml"
    flags = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", *flags)
    fork(lambda: pytest.main([*flags, f"--junitxml={report}", str(LESSONS / "exercises")]))
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next(iter(case), None)
        name = f"{case.get('classname')}.{case.get('name')}"
        outcomes[name] = "passed" if problem is None else problem.get("message", "")
    return outcomes


@pytest.mark.slow
def test_every_exercise_fails_on_its_stub_and_passes_on_its_solution(tmp_path: Path) -> None:
    stubs = exercise_outcomes(tmp_path)
    solved = exercise_outcomes(tmp_path, "--solutions")
    assert len(stubs) >= 3 * len(PATHS)
    assert {name for name, said in stubs.items() if "NotImplementedError" not in said} == set()
    assert {name: said for name, said in solved.items() if said != "passed"} == {}
    assert stubs.keys() == solved.keys()
