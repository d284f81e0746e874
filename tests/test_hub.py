"""An adapter by its hub name: the real loading code on a cache in the hub client's layout."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants

import minilora
from minilora import LoRAConfig
from minilora.__main__ import main
from minilora.summarization import hub
from minilora.summarization.data.sources import find
from minilora.summarization.errors import UserError
from minilora.summarization.model.loading import adapter_directory, load_model
from minilora.summarization.settings import DataOptions

NAME, REVISION = "someone/bart-lora-samsum", "0" * 40


def adapter_files(directory: Path) -> Path:
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 5)})
    minilora.inject(model, LoRAConfig(rank=2, targets=("q_proj",), init="random"))
    minilora.save_adapter(model, directory)
    return directory


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one adapter, as after a download; returns its snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--bart-lora-samsum"
    snapshot = repository / "snapshots" / REVISION
    shutil.copytree(adapter_files(tmp_path / "adapter"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_hub_name_is_a_directory_of_the_cache(cached: Path) -> None:
    directory = adapter_directory(NAME)
    assert directory == cached
    assert minilora.read_adapter(directory).modules == ("q_proj",)


def test_a_directory_of_that_name_comes_first(cached: Path, tmp_path: Path) -> None:
    local = adapter_files(tmp_path / NAME)
    assert adapter_directory(NAME) == Path(NAME)
    assert (tmp_path / adapter_directory(NAME)).samefile(local)


def test_inspect_takes_a_hub_name(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", NAME]) == 0
    assert "q_proj" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["nobody/nothing", "runs/misspelt", "./nothing", "a/b/c", "nothing"]
)
def test_a_name_that_is_nowhere_is_one_line(
    name: str, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no such directory") as error:
        adapter_directory(name)
    assert name in str(error.value)
    assert ("hub" in str(error.value)) == (name == "nobody/nothing")
    assert main(["inspect", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_repository_without_an_adapter_is_named(cached: Path) -> None:
    (cached / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="it is no adapter"):
        adapter_directory(NAME)


def test_the_tests_have_a_cache_of_their_own() -> None:
    """What the user has downloaded changes no test, and no test writes there."""
    places = (constants.HF_HOME, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    assert all("minilora-tests-" in str(place) for place in places)


@pytest.mark.parametrize("read", [load_model, adapter_directory, find])
def test_without_a_network_it_takes_no_minute(
    read: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of the hub would try again and again. What is in the cache is still found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "getproxies", dict)
    name = DataOptions(data="nobody/nothing") if read is find else "nobody/nothing"
    started = time.monotonic()
    with pytest.raises(UserError, match="offline it is not in the hub's cache: give a path"):
        read(*([name] if read is not load_model else [name, torch.device("cpu")]))
    assert time.monotonic() - started < 30
    assert constants.HF_HUB_OFFLINE
