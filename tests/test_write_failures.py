"""Disks that are full, read-only or damaged: one clear line or the older checkpoint; nothing lost.

Every fault strikes a run that has an adapter and checkpoints already. Afterwards the adapter is
readable, and once the fault is gone, the run goes on and ends as if nothing had happened.
"""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import minilora
from minilora.__main__ import main
from minilora.summarization import commands
from minilora.summarization.cli import train_main
from minilora.summarization.training import trainer
from tests.faults import unreadable
from tests.helpers import SMALL, records, save_bart, save_data
from tests.marks import slow_but


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bart, data, a whole run of four steps, and the same stopped after its first epoch."""
    folder = tmp_path_factory.mktemp("writes")
    save_bart(folder / "bart")
    save_data(folder / "data", train=12)
    assert train_main(flags(folder, folder / "whole")) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        assert train_main(flags(folder, folder / "half")) == 130
    return folder


def flags(folder: Path, output: Path) -> list[str]:
    base = ["--model", str(folder / "bart"), "--data", str(folder / "data"), *SMALL]
    return [*base, "--rank", "3", "--checkpoint-steps", "1", "--output", str(output)]


def stop_at(patch: pytest.MonkeyPatch, number: int) -> None:
    original = trainer.Trainer.step

    def step(trainer: Any, group: Any) -> Any:
        if trainer.progress.step + 1 == number:
            os.kill(os.getpid(), 15)
        return original(trainer, group)

    patch.setattr(trainer.Trainer, "step", step)


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run: checkpoints of steps 2 (validated) and 3, and an adapter."""
    shutil.copytree(folder / "half", tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002-validated", "step-00000003"]
    return tmp_path / "run"


def check_ends_the_same(run: Path, whole: Path) -> None:
    assert unreadable(run) == []
    assert minilora.read_adapter(run / "adapter").modules
    assert train_main(["--resume", str(run)]) == 0
    for name in ("adapter/adapter_model.safetensors", "evaluation.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert records(run) == records(whole)
    assert not list(run.rglob(".*"))


def check_one_line(said: str, *parts: str) -> None:
    lines = [line for line in said.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, said
    assert lines[0].startswith("train.py: ")
    for part in parts:
        assert part in lines[0]


# Writes that fail ---------------------------------------------------------------------------------

CALLS: dict[str, tuple[Any, str]] = {
    "flush": (os, "fsync"),
    "rename": (Path, "replace"),
    "rename a directory": (Path, "rename"),
    "create": (os, "open"),
    "make a directory": (os, "mkdir"),
}
ERRORS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT]
CASES = [(call, error) for call in CALLS for error in ERRORS[:2]] + [("flush", e) for e in ERRORS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "error"), sorted(set(CASES)), ids=lambda v: errno.errorcode.get(v, v)
)
@pytest.mark.parametrize("after", [0, 1])  # the last rename is the report's, which a run may lack
def test_a_call_that_fails(
    folder: Path, run: Path, capfd: Any, call: str, error: int, after: int
) -> None:
    """Every call below the run's directory fails from some moment on, as on a disk that is full."""
    owner, name = CALLS[call]
    original, calls = getattr(owner, name), [0]

    def fail(*arguments: Any, **more: Any) -> Any:
        target = arguments[0]
        if name == "fsync":
            target = Path(f"/proc/self/fd/{target}").readlink()
        if str(target).startswith(str(run)):
            calls[0] += 1
            if calls[0] > after:
                raise OSError(error, os.strerror(error), str(target))
        return original(*arguments, **more)

    if name == "fsync" and not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        code = train_main(["--resume", str(run)])
    said = capfd.readouterr().err
    assert (code, calls[0] > after) in ((2, True), (0, False))
    if code == 2:
        check_one_line(said, os.strerror(error))
    check_ends_the_same(run, folder / "whole")


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.mark.parametrize("free_bytes", slow_but([20_000], [0, 10_000, 20_000, 40_000]))
def test_a_disk_that_is_really_full(
    folder: Path, tmp_path: Path, capfd: Any, free_bytes: int
) -> None:
    """A tmpfs of a megabyte that a file fills but for so many bytes."""
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", "1m"):
        run, ballast = tmp_path / "disk" / "run", tmp_path / "disk" / "ballast"
        shutil.copytree(folder / "half", run)
        free = shutil.disk_usage(run).free
        ballast.write_bytes(bytes(free - free_bytes))
        assert train_main(["--resume", str(run)]) == 2
        check_one_line(capfd.readouterr().err, "No space left on device")
        ballast.unlink()
        check_ends_the_same(run, folder / "whole")


def test_a_new_run_on_a_full_disk(folder: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", "16k"):
        assert train_main(flags(folder, tmp_path / "disk" / "run")) == 2
        check_one_line(capfd.readouterr().err, "No space left on device", "--resume")


def test_a_disk_that_is_really_read_only(folder: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", "1m"):
        run = tmp_path / "disk" / "run"
        shutil.copytree(folder / "half", run)
        remount = ["mount", "-o", "remount,ro", str(tmp_path / "disk")]
        subprocess.run(remount, check=True)
        new = flags(folder, tmp_path / "disk" / "new")
        for argv, what in ((["--resume", str(run)], "/run"), (new, "")):
            assert train_main(argv) == 2
            check_one_line(capfd.readouterr().err, f"disk{what} is not writable: ")
        subprocess.run([*remount[:2], "remount,rw", remount[-1]], check=True)
        check_ends_the_same(run, folder / "whole")


def test_no_model_is_loaded_for_a_directory_that_cannot_be_written(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(commands, "open_session", lambda _: pytest.fail("too late"))
    monkeypatch.chdir(tmp_path)
    *common, _, _ = flags(folder, tmp_path)
    for argv, what, advice in (
        (flags(folder, tmp_path / "new"), f"--output {tmp_path / 'new'}", "name another directory"),
        (["--resume", str(run)], f"--resume {run}", "change its permissions, or copy the run"),
        (common, "runs", "name another directory with --output"),
    ):
        assert train_main(argv) == 2
        check_one_line(capfd.readouterr().err, what, " is not writable: ", advice)


def test_a_new_run_that_cannot_be_begun(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commands, "write_config", full)
    assert train_main(flags(folder, tmp_path / "run")) == 2
    check_one_line(capfd.readouterr().err, "(No space left on device): free some space, or name")


def test_files_that_may_not_grow(folder: Path, run: Path, capfd: Any) -> None:
    """A limit on the size of files (ulimit -f): a write stops in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        assert train_main(["--resume", str(run)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_one_line(capfd.readouterr().err, "File too large")
    check_ends_the_same(run, folder / "whole")


@pytest.mark.parametrize("command", ["train", "merge"])
def test_a_model_that_does_not_fit_is_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, capfd: Any, command: str
) -> None:
    """The errors of safetensors are not OSErrors."""
    argv = ["merge", str(folder / "whole"), str(tmp_path / "out")]
    if command == "train":
        argv = [
            "train",
            *flags(folder, tmp_path / "out"),
            "--method",
            "full",
            "--checkpoint-steps",
            "0",
        ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capfd.readouterr().err
    assert "File too large" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert ("--resume" in said) == (command == "train")
    left = [path.name for path in tmp_path.rglob("*")]
    assert sorted(left) == (["config.json", "log.jsonl", "out"] if command == "train" else [])


# Files that are damaged ---------------------------------------------------------------------------


def flip(name: str, at: float) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[int(at * (len(content) - 1))] ^= 16
        (path / name).write_bytes(bytes(content))

    return damage


def cut(name: str, at: float) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(at * len(content))])

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{
        f"flipped {n} {at}": flip(n, at) for n in ("state.safetensors",) for at in (0, 0.01, 0.5, 1)
    },
    **{f"flipped {n}": flip(n, 0.4) for n in ("state.json", "SHA256SUMS")},
    **{f"cut {n} {at}": cut(n, at) for n in ("state.safetensors", "state.json") for at in (0, 0.9)},
    "cut SHA256SUMS": cut("SHA256SUMS", 0.5),
    **{
        f"deleted {n}": lambda path, n=n: (path / n).unlink()
        for n in ("state.safetensors", "state.json", "SHA256SUMS")
    },
    "emptied": lambda path: [file.unlink() for file in path.iterdir()],
    "a directory for a file": lambda path: [
        (path / "state.json").unlink(),
        (path / "state.json").mkdir(),
    ],
    "swapped for another's": lambda path: shutil.copy(
        path.parent / "step-00000002-validated" / "state.safetensors", path
    ),
}


FEW = [DAMAGES[name] for name in ("deleted state.json", "swapped for another's", "emptied")]


@pytest.mark.parametrize("damage", slow_but(FEW, DAMAGES.values()), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    folder: Path, run: Path, capfd: Any, damage: Callable[[Path], object]
) -> None:
    damage(run / "checkpoints" / "step-00000003")
    assert unreadable(run) != []
    assert train_main(["--resume", str(run)]) == 0
    said = capfd.readouterr().err
    assert "step-00000003 is damaged" in said
    assert records(run) == records(folder / "whole")
    check_ends_the_same(run, folder / "whole")


def test_all_checkpoints_damaged_is_no_reason_to_begin_again_in_silence(
    run: Path, capfd: Any
) -> None:
    for path in (run / "checkpoints").iterdir():
        flip("state.safetensors", 0.5)(path)
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert train_main(["--resume", str(run)]) == 2
    check_one_line(capfd.readouterr().err, "all 2 checkpoints are damaged")
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_without_checkpoints_what_is_trained_is_not_replaced(
    folder: Path, tmp_path: Path, run: Path, capfd: Any
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(folder / "whole", whole)
    for path in (whole, run):
        shutil.rmtree(path / "checkpoints")
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert train_main(["--resume", str(whole), "--evaluate"]) == 2
    check_one_line(capfd.readouterr().err, "its checkpoints/ is gone", "score it with evaluate.py")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    assert train_main(["--resume", str(run)]) == 0  # as killed before its first checkpoint
    assert f"note: {run} has no checkpoint: it begins again at step 0" in capfd.readouterr().err
    check_ends_the_same(run, folder / "whole")


def test_a_lost_adapter_or_log_is_said_or_made_again(folder: Path, run: Path, capfd: Any) -> None:
    (run / "log.jsonl").write_bytes(b"")
    assert train_main(["--resume", str(run)]) == 0
    error = capfd.readouterr().err
    assert "log.jsonl lost" in error
    assert "training goes on" in error
