"""The programs in examples/ run, use public names only, stay short, and do what they print."""

import ast
import re
from pathlib import Path

import pytest
import torch

import minilora
from tests.forks import run_script

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PATHS = sorted(EXAMPLES.glob("*.py"))
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def run(name: str, folder: Path) -> str:
    """What an example prints when it is run in an empty folder."""
    done = run_script(EXAMPLES / f"{name}.py", folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(output: str, before: str) -> list[float]:
    """The numbers after a text, in every line that has it."""
    return [float(number) for number in re.findall(rf"{before}'?:? '?(-?[\d.]+)", output)]


@each
def test_an_example_has_at_most_forty_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


@each
def test_an_example_uses_public_names_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "minilora":
            used.add(node.attr)
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("minilora.")
    assert used
    assert used <= set(minilora.__all__)


def test_a_llama_learns_and_its_adapter_is_saved(tmp_path: Path) -> None:
    output = run("llama", tmp_path)
    (first, last), (base,), (merged,) = (
        [float(n) for n in re.findall(r"[\d.]+", line)]
        for line in output.splitlines()
        if line.startswith("loss")
    )
    assert last < 0.8 * first
    assert base == first  # B starts at zero: the first loss is the base's
    assert merged <= last
    adapter = minilora.read_adapter(tmp_path / "llama-adapter")
    assert all(adapter.pair(module)[1].any() for module in adapter.modules)  # every B trained


def test_the_trainer_trains_the_adapter(tmp_path: Path) -> None:
    losses = numbers(run("trainer", tmp_path), "loss")
    assert losses[-2] < 0.8 * losses[0]  # the last is the mean of all steps
    adapter = minilora.read_adapter(tmp_path / "trainer-adapter")
    assert all(adapter.pair(module)[1].any() for module in adapter.modules)


def test_an_own_module_learns_a_second_task_and_keeps_the_first(tmp_path: Path) -> None:
    output = run("own_module", tmp_path)
    (before,), (after,) = numbers(output, "second task before"), numbers(output, "after")
    (first,) = numbers(output, "without the adapter")
    assert after < before / 10
    assert first < before / 10
    pair = minilora.read_adapter(tmp_path / "second-task").pair("0")
    assert torch.linalg.matrix_rank(pair[1] @ pair[0]) == 2
