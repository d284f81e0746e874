"""What pip installs: the command, the description and its links; what CI and pre-commit run."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_the_command_is_the_library_s_main(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.search(r'^\[project\.scripts\]\nminilora = "(.+)"$', PYPROJECT, re.MULTILINE)
    assert found is not None
    main = EntryPoint("minilora", found.group(1), "console_scripts").load()
    monkeypatch.setattr(sys, "argv", ["minilora", "--version"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("minilora ")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("command", ["train.py", "evaluate.py", "-m minilora train", "minilora"])
def test_ctrl_c_in_the_first_seconds_prints_no_traceback(
    command: str, seconds: float, tmp_path: Path
) -> None:
    """Before PyTorch is imported, while it is, and after; Python itself has started."""
    before = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    seconds = max(seconds, 3 * (time.monotonic() - before))  # on a slow machine
    installed = tmp_path / "minilora"  # as pip writes it
    installed.write_text("import sys\nfrom minilora.__main__ import main\nsys.exit(main())\n")
    output = ["--output", str(tmp_path / "run")]
    words = {
        "train.py": [str(ROOT / "train.py"), *output],
        "evaluate.py": [str(ROOT / "evaluate.py"), str(tmp_path)],
        "-m minilora train": ["-m", "minilora", "train", *output],
        "minilora": [str(installed), "train", *output],
    }[command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    process = subprocess.Popen([sys.executable, *words], env=environment, **pipes)
    try:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    if error == f"evaluate.py: {tmp_path} is not a run: it has no config.json\n":
        pytest.skip("it ended before, or was about to: a fast machine")
    assert process.returncode in (-signal.SIGINT, 130)
    program = command if command.endswith(".py") else "minilora train"
    assert error in ("", f"{program}: interrupted\n")


def test_ctrl_c_reaches_the_programs_that_import_minilora(tmp_path: Path) -> None:
    """Only a command of minilora changes what the signal does."""
    script = tmp_path / "train.py"
    lines = (
        "import signal",
        "import minilora",
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
    )
    script.write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), "minilora"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "True\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup: the process runs to its end, which is an error message."""
    ignored = f"trap '' INT; exec {sys.executable} {ROOT / 'evaluate.py'} {tmp_path}"
    process = subprocess.Popen(["sh", "-c", ignored], stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 2


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
    words = {word for c in commands if c.startswith("make") for word in c.split()[1:]}
    targets = {word for word in words if "=" not in word}
    makefile = (ROOT / "Makefile").read_text()
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []


def test_every_version_of_python_that_is_claimed_is_tested() -> None:
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert f'requires-python = ">={claimed[0]}"' in PYPROJECT
    assert f"(Python {claimed[0]} to {claimed[-1]})" in (ROOT / "README.md").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert workflow["jobs"]["python"]["strategy"]["matrix"]["python"] == claimed
    ends = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert {(end["python"], end["resolution"]) for end in ends} == {
        (claimed[0], "lowest-direct"), (claimed[-1], "highest")
    }  # fmt: skip
    assert workflow["jobs"]["package"]["strategy"]["matrix"]["python"] == [claimed[0], claimed[-1]]


@pytest.mark.parametrize("version", ["3.10.13", "3.11.7", "3.14.8"])
def test_each_package_has_one_version_for_a_python(version: str) -> None:
    """And one that pyproject.toml allows."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    environment = {"python_version": ".".join(version.split(".")[:2])}
    found = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in found}
    assert len(versions) == len(found)
    wanted = [Requirement(text) for text in re.findall(r'"([A-Za-z_-]+>=[\d.]+)"', PYPROJECT)]
    wanted = [requirement for requirement in wanted if requirement.name != "setuptools"]
    assert len(wanted) > 15
    for requirement in wanted:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])


def test_the_source_archive_takes_what_the_tests_read() -> None:
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    taken = {name for line in lines if line[:1].islower() for name in line.split()[1:]}
    folders = {"tests", "docs", "lessons", "benchmarks", "examples", "pretraining", ".github"}
    files = {"train.py", "evaluate.py", "constraints.txt", "CITATION.cff", "Makefile"}
    files |= {"CHANGELOG.md", "CONTRIBUTING.md", ".pre-commit-config.yaml"}
    assert folders | files <= taken


def test_pre_commit_and_the_constraints_have_one_version_of_ruff() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    version = repository["rev"].removeprefix("v")
    assert f"ruff=={version}\n" in (ROOT / "constraints.txt").read_text()
