"""A run that an older version wrote is resumed and evaluated.

tests/fixtures/older_run was made before the task was divided into folders, with `--auto-batch-size`
and `--skip-bad-batches` in its config.json: `whole` ran to its end, `run` was stopped after step 6.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minilora.summarization.cli import evaluate_main, train_main
from minilora.summarization.settings import REMOVED
from tests.helpers import records

FIXTURE = Path(__file__).parent / "fixtures" / "older_run"
DEFAULTS = {name: default for name, (default, _) in REMOVED.items()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, as the working directory: config.json names model and data by relative paths."""
    shutil.copytree(FIXTURE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_it_is_resumed_and_ends_as_it_would_have(here: Path, capfd: Any) -> None:
    assert DEFAULTS.items() <= json.loads((here / "run" / "config.json").read_text()).items()
    assert train_main(["--resume", "run"]) == 0
    noted = [line for line in capfd.readouterr().err.splitlines() if "removed" in line]
    assert noted == []
    ours, theirs = records(here / "run"), records(here / "whole")
    assert [r["kind"] for r in ours] == [r["kind"] for r in theirs]
    if not torch.__version__.startswith("2.13."):
        pytest.skip("it is resumed; another torch than the fixture's draws other dropout masks")
    for mine, other in zip(ours, theirs, strict=True):  # another machine rounds differently
        for key in other.keys() - {"kind"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-3), key
    weights = [
        load_file(here / run / "adapter" / "adapter_model.safetensors") for run in ("run", "whole")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)


def test_it_is_evaluated(here: Path) -> None:
    assert evaluate_main(["whole", "--output", "e.json"]) == 0
    found, before = (json.loads(Path(p).read_text()) for p in ("e.json", "whole/evaluation.json"))
    # shares of nonsense are new, and the name of ROUGE's tokenizer
    assert found.keys() - before.keys() == {"reference", "rouge_tokenizer"}
    assert not before.keys() - found.keys()
    assert found["generation"] == before["generation"]
    assert [e["id"] for e in found["examples"]] == [e["id"] for e in before["examples"]]
    for side in ("base", "finetuned"):
        for name, mean in before[side].items():
            # Four texts of 12 tokens: another machine's rounding may end one of them earlier.
            assert found[side][name] == pytest.approx(mean, abs=0.5)


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_that_had_an_effect_is_named_in_one_line(
    here: Path, capfd: Any, name: str
) -> None:
    flag = f"--{name.replace('_', '-')}"
    change(here / "run" / "config.json", **{name: True})
    assert train_main(["--resume", "run"]) == 0
    noted = [line for line in capfd.readouterr().err.splitlines() if flag in line]
    assert noted == [
        f"note: run/config.json: {flag} (was True) was removed and has no effect: "
        f"{REMOVED[name][1]}"
    ]
    with pytest.raises(SystemExit) as caught:
        train_main([flag])
    assert caught.value.code == 2
    assert capfd.readouterr().err == f"train.py: {flag} was removed: {REMOVED[name][1]}\n"
