"""A checkpoint gives back all that it was given, bit for bit, or is passed over."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minilora.summarization.errors import UserError
from minilora.summarization.training.checkpoint import (
    Progress,
    load_checkpoint,
    newest_first,
    save_checkpoint,
)

ORIGIN = {"train data": "0123", "torch": "2.13"}


class Parts:
    """A model with one frozen layer, its optimizer and a scaler, after some steps."""

    def __init__(self, seed: int, steps: int = 0, width: int = 4, fp16: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, width))
        self.model[0].requires_grad_(False)
        trained = list(self.model[1].parameters())
        self.optimizer = torch.optim.AdamW(trained, lr=0.01, fused=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=32.0, enabled=fp16)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.dropout(self.model(torch.randn(3, 4)).square()).mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def save(self, directory: Path, **progress: Any) -> Path:
        what = (self.model, self.optimizer, self.scaler)
        save_checkpoint(directory, Progress(**progress), *what, ORIGIN)
        return newest_first(directory)[0]

    def load(self, directory: Path) -> tuple[Progress, list[str]]:
        progress, _, notices = load_checkpoint(directory, self.model, self.optimizer, self.scaler)
        return progress, notices

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model[1].parameters()]


def test_there_is_none(tmp_path: Path) -> None:
    parts = Parts(0)
    before = parts.weights()
    assert parts.load(tmp_path / "nothing") == (Progress(), [])
    assert all(map(torch.equal, parts.weights(), before))


@pytest.mark.parametrize("fp16", [False, True])
def test_all_goes_on_as_if_nothing_had_happened(tmp_path: Path, fp16: bool) -> None:
    parts = Parts(0, steps=3, fp16=fp16)
    progress = {"step": 3, "epoch": 1, "position": 2, "best": 12.5, "seconds": 9.5, "log_bytes": 77}
    parts.save(tmp_path, **progress)
    parts.step()
    parts.step()

    other = Parts(0, fp16=fp16)  # the same frozen base; another state in all the rest
    other.step()
    assert not all(map(torch.equal, other.weights(), parts.weights()))
    assert other.load(tmp_path) == (Progress(**progress), [])
    other.step()
    other.step()
    assert all(map(torch.equal, other.weights(), parts.weights()))
    assert other.scaler.state_dict() == parts.scaler.state_dict()


def test_the_random_state_of_apples_gpu_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.set_state)
    Parts(0).save(tmp_path)
    first = torch.rand(3, generator=generator)
    assert not torch.equal(torch.rand(3, generator=generator), first)
    Parts(0).load(tmp_path)
    assert torch.equal(torch.rand(3, generator=generator), first)


def test_frozen_weights_are_not_in_it(tmp_path: Path) -> None:
    Parts(0, steps=1).save(tmp_path, step=1)
    other = Parts(5)
    frozen = other.model[0].weight.clone()
    other.load(tmp_path)
    assert torch.equal(other.model[0].weight, frozen)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_two_are_kept_and_the_best(tmp_path: Path) -> None:
    parts = Parts(0, steps=1)
    for step in (1, 9, 10, 100):
        parts.save(tmp_path, step=step, position=1)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    assert parts.load(tmp_path)[0].step == 100
    parts.save(tmp_path, step=100, epoch=1, validated=True, best=1.0, best_step=100)
    assert parts.load(tmp_path)[0].epoch == 1
    for step in (101, 102, 200):
        parts.save(tmp_path, step=step, position=1, best=1.0, best_step=100)
    assert names(tmp_path) == ["step-00000100-validated", "step-00000102", "step-00000200"]


def test_one_that_is_there_is_left_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    parts = Parts(0, steps=1)
    path = parts.save(tmp_path, step=1, seconds=1.0)
    before = path.stat().st_ino
    parts.save(tmp_path, step=1, seconds=2.0)
    assert path.stat().st_ino == before
    flip_a_byte(path)
    parts.save(tmp_path, step=1, seconds=3.0)
    assert Parts(0).load(tmp_path) == (Progress(step=1, seconds=3.0), [])
    assert names(tmp_path) == ["step-00000001"]


def test_changes_that_were_accepted_replace_one_that_is_there(tmp_path: Path) -> None:
    parts = Parts(0, steps=1)
    parts.save(tmp_path, step=1, seconds=1.0)
    what = (parts.model, parts.optimizer, parts.scaler)
    save_checkpoint(tmp_path, Progress(step=1, seconds=2.0), *what, ORIGIN | {"train data": "4"})
    progress, origin, notices = load_checkpoint(tmp_path, *what)
    assert (progress.seconds, origin["train data"], notices) == (2.0, "4", [])
    assert names(tmp_path) == ["step-00000001"]


def test_the_name_tells_of_an_earlier_version_whether_it_is_validated(tmp_path: Path) -> None:
    parts = Parts(0, steps=1)
    for step, validated in ((1, False), (2, True)):
        path = parts.save(tmp_path, step=step, validated=validated)
        state = json.loads((path / "state.json").read_text())
        del state["progress"]["validated"]
        rewrite_state(path, json.dumps(state).encode())
        assert parts.load(tmp_path) == (Progress(step=step, validated=validated), [])


def test_a_damaged_newer_one_pushes_no_whole_one_out(tmp_path: Path) -> None:
    parts = Parts(0, steps=1)
    for step in (1, 2, 9):
        last = parts.save(tmp_path, step=step)
    flip_a_byte(last)
    assert Parts(0).load(tmp_path)[0].step == 2
    save_checkpoint(tmp_path, Progress(step=3), *vars(parts).values(), keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_what_the_run_began_with_is_given_back(tmp_path: Path) -> None:
    parts = Parts(0, steps=1)
    parts.save(tmp_path, step=1)
    assert load_checkpoint(tmp_path, *vars(parts).values())[1] == ORIGIN


def flip_a_byte(path: Path, name: str = "state.safetensors", at: int = -3) -> None:
    content = bytearray((path / name).read_bytes())
    content[at] ^= 1
    (path / name).write_bytes(bytes(content))


def rewrite_state(path: Path, content: bytes) -> None:
    """With its checksum: the checkpoint is not damaged."""
    (path / "state.json").write_bytes(content)
    sums = (path / "SHA256SUMS").read_text().splitlines()
    sums[1] = f"{hashlib.sha256(content).hexdigest()}  state.json"
    (path / "SHA256SUMS").write_text("\n".join(sums))


DAMAGES = {
    "a flipped byte": flip_a_byte,
    "a flipped digit": lambda path: flip_a_byte(path, "state.json", 30),
    "a flipped checksum": lambda path: flip_a_byte(path, "SHA256SUMS", 3),
    "no text": lambda path: (path / "SHA256SUMS").write_bytes(b"\xff\xfe"),
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "cut tensors": lambda path: (path / "state.safetensors").write_bytes(b"12345678"),
    "no state": lambda path: (path / "state.json").unlink(),
    "no checksums": lambda path: (path / "SHA256SUMS").unlink(),
    "cut state": lambda path: (path / "state.json").write_text('{"progress": {'),
    "another state": lambda path: (path / "state.json").write_text("[]"),
    "a file in its place": lambda path: [shutil.rmtree(path), path.write_bytes(b"")],
    "nothing": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_passed_over_aloud(tmp_path: Path, damage: Any) -> None:
    parts = Parts(0, steps=1)
    parts.save(tmp_path, step=1)
    before = parts.weights()
    parts.step()
    damage(parts.save(tmp_path, step=2))
    other = Parts(0)
    progress, notices = other.load(tmp_path)
    assert progress.step == 1
    assert all(map(torch.equal, other.weights(), before))
    assert len(notices) == 1
    assert "step-00000002 is damaged" in notices[0]


def test_where_none_is_whole_nothing_begins_again_in_silence(tmp_path: Path) -> None:
    parts = Parts(0, steps=1)
    flip_a_byte(parts.save(tmp_path, step=2))
    with pytest.raises(UserError, match=r"all 1 checkpoints are damaged .*state\.safetensors"):
        Parts(0).load(tmp_path)


def test_fields_that_are_unknown_are_damage(tmp_path: Path) -> None:
    path = Parts(0, steps=1).save(tmp_path, step=2)
    state = json.loads((path / "state.json").read_text())
    rewrite_state(path, json.dumps(state | {"progress": {"stepp": 2}}).encode())
    with pytest.raises(UserError, match="stepp"):
        Parts(0).load(tmp_path)


def test_one_of_another_model_is_refused_untouched(tmp_path: Path) -> None:
    Parts(0, steps=1).save(tmp_path, step=1)
    other = Parts(0, width=1)
    before = other.weights()
    with pytest.raises(UserError, match="other parameters"):
        other.load(tmp_path)
    more = Parts(0)
    more.model[0].requires_grad_(True)
    with pytest.raises(UserError, match="other parameters"):
        more.load(tmp_path)
    assert all(map(torch.equal, other.weights(), before))


def test_a_run_without_fp16_goes_on_with_it(tmp_path: Path) -> None:
    """`auto` chooses by the machine, and --resume may change the device."""
    Parts(0, steps=1).save(tmp_path, step=1)
    assert Parts(0, fp16=True).load(tmp_path)[0].step == 1


def test_a_failed_write_leaves_the_one_before(tmp_path: Path, monkeypatch: Any) -> None:
    parts = Parts(0, steps=1)
    parts.save(tmp_path, step=1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space"):
            parts.save(tmp_path, step=2)
    assert Parts(0).load(tmp_path) == (Progress(step=1), [])
