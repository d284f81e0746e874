"""Every public name says what it takes, gives and raises; the examples are true; help() reads."""

import doctest
import importlib
import inspect
import pkgutil
import pydoc
import re
from types import ModuleType

import pytest

import minilora
import minilora.summarization

FUNCTIONS = [n for n in minilora.__all__ if inspect.isfunction(getattr(minilora, n))]
CLASSES = [n for n in minilora.__all__ if inspect.isclass(getattr(minilora, n))]
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")
RAISES_NOTHING = {"config_of", "trainable_parameters", "unload", "LoRAError"}
# Made by functions that show one.
NO_EXAMPLE = {"Fitted", "LoadReport", "MergeReport", "TrainingReport"}
# What comes from a paper.
PAPERS = ["LoRAConfig", "LoRALinear", "NF4Linear", "inject", "unwrap", "extract", "quantize"]
# Made by the library, never by a person.
REPORTS = {"InjectReport", "LoadReport", "MergeReport", "QuantizeReport", "TrainingReport"}


def sections(name: str) -> dict[str, str]:
    """The parts of a docstring by their headings; what stands before the first is ''."""
    text = inspect.getdoc(getattr(minilora, name)) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", text, flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def parameters(name: str) -> list[str]:
    return [p for p in inspect.signature(getattr(minilora, name)).parameters if p != "self"]


def test_every_public_name_is_a_function_or_a_class() -> None:
    assert sorted(FUNCTIONS + CLASSES) == sorted(minilora.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_says_what_it_takes_gives_raises_and_shows_it(name: str) -> None:
    said = sections(name)
    for parameter in parameters(name):
        assert re.search(rf"\b{parameter}: ", said.get("Args", "")), f"{parameter} is not in Args"
    returned = inspect.signature(getattr(minilora, name)).return_annotation
    named = said[""].splitlines()[0]  # "The LoRAConfig the model carries, or None." says it all
    says = "Returns" in said or named.startswith(("The ", "One ", "An ", "Inside "))
    assert returned is None or says, "says not what it returns"
    assert "Raises" in said or name in RAISES_NOTHING
    assert ">>>" in said.get("Example", "")


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_says_what_it_holds_and_refuses(name: str) -> None:
    said = sections(name)
    for parameter in parameters(name):
        held = said.get("Args", "") + said.get("Attributes", "")
        assert re.search(rf"\b{parameter}(: |`)", held), f"{parameter} is neither in Args nor ..."
    assert "Raises" in said or name in RAISES_NOTHING | REPORTS
    assert ">>>" in said.get("Example", "") or name in NO_EXAMPLE


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_method_has_a_docstring(name: str) -> None:
    kind = getattr(minilora, name)
    members = {key: value for key, value in vars(kind).items() if not key.startswith("_")}
    methods = {k: v for k, v in members.items() if inspect.isfunction(v) or isinstance(v, property)}
    assert [key for key, value in methods.items() if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("name", ["LoRALinear", "Adapter"])
def test_the_shapes_of_a_and_b_are_given(name: str) -> None:
    text = inspect.getdoc(getattr(minilora, name)) or ""
    assert "(r, in)" in text
    assert "(out, r)" in text


@pytest.mark.parametrize("name", ["NF4Linear", "quantize"])
def test_the_shape_of_a_weight_is_given(name: str) -> None:
    assert "(out, in)" in (inspect.getdoc(getattr(minilora, name)) or "")


@pytest.mark.parametrize("name", PAPERS)
def test_what_comes_from_a_paper_names_it(name: str) -> None:
    assert re.search(r"(19|20)\d\d", inspect.getdoc(getattr(minilora, name)) or "")


def test_help_lists_every_public_name() -> None:
    page = pydoc.plain(pydoc.render_doc(minilora))
    assert [name for name in minilora.__all__ if not re.search(rf"\b{name}\b", page)] == []
    opening = page[page.index("DESCRIPTION") : page.index("PACKAGE CONTENTS")]
    assert [name for name in minilora.__all__ if not re.search(rf"\b{name}\b", opening)] == []


def task_modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(minilora.summarization.__path__, "minilora.summarization.")
    return [importlib.import_module(module.name) for module in found]


@pytest.mark.parametrize("module", [minilora, *task_modules()], ids=lambda m: m.__name__)
def test_the_examples_in_the_docstrings_are_true(module: ModuleType) -> None:
    """Those of the library's files run in test_architecture."""
    assert doctest.testmod(module).failed == 0
