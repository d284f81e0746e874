"""What pip installs: the command, the description and its links; what CI and pre-commit run."""

import importlib.util
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minilora_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_is_the_library_s_main(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r'^\[project\.scripts\]\nminilora = "(.+)"$', PYPROJECT, re.MULTILINE)
    assert found is not None
    main = EntryPoint("minilora", found.group(1), "console_scripts").load()
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("minilora ")


def test_relative_links_lead_to_the_repository(setup_script: ModuleType) -> None:
    readme = "[a](docs/a.md#b) ![p](docs/p.png) [c](#c) [d](https://d.example) `x[i](j)`"
    wanted = (
        "[a](https://r.example/blob/HEAD/docs/a.md#b) ![p](https://r.example/raw/HEAD/docs/p.png) "
        "[c](#c) [d](https://d.example) `x[i](https://r.example/blob/HEAD/j)`"
    )
    assert setup_script.description(readme, "https://r.example") == wanted
    assert setup_script.description(readme, None) == readme
    whole = setup_script.description((ROOT / "README.md").read_text(), "https://r.example")
    links = re.findall(r"\]\(([^)\s]+)\)", whole)
    assert len(links) > 20
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_the_address_is_that_of_project_urls(setup_script: ModuleType) -> None:
    known = '[project.urls]\nRepository = "https://r.example/"\n'
    assert setup_script.address(known) == "https://r.example"
    assert setup_script.address('# Repository = "https://..."\n') is None


@pytest.mark.parametrize("name", ["test", "nightly"])
def test_a_workflow_runs_targets_that_exist(name: str) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands
    targets = {word for c in commands if c.startswith("make") for word in c.split()[1:]}
    makefile = (ROOT / "Makefile").read_text()
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []


def test_the_lowest_torch_of_the_workflow_is_that_of_the_package() -> None:
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    for package in ("torch", "transformers"):
        lowest = re.search(rf'"{package}>=([\d.]+)"', PYPROJECT)
        assert lowest is not None
        assert f"{package}=={lowest.group(1)}.*" in workflow


def test_pre_commit_and_the_constraints_have_one_version_of_ruff() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    version = repository["rev"].removeprefix("v")
    assert f"ruff=={version}\n" in (ROOT / "constraints.txt").read_text()
