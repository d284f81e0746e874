"""`python -m pytest lessons/exercises/test_lesson_2.py` checks what you wrote in lesson_2.py.

With `--solutions` the same tests check the solutions.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

LESSONS = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--solutions", action="store_true", help="check lessons/solutions instead")


@pytest.fixture
def work(request: pytest.FixtureRequest) -> ModuleType:
    """The exercises (or solutions) that belong to the test file: test_lesson_2 -> lesson_2."""
    folder = "solutions" if request.config.getoption("--solutions") else "exercises"
    name = request.path.stem.removeprefix("test_")
    spec = importlib.util.spec_from_file_location(name, LESSONS / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
