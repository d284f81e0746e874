"""Files are old or new, never between."""

import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from minilora.files import sync, write_directory, write_file
from minilora.summarization.files import put_directory, remove_directory, sweep


def test_a_file_is_written_whole_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_file(path, b"one\0two")
    assert path.read_bytes() == b"one\0two"
    write_file(path, b"")
    assert path.read_bytes() == b""
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "open", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "fsync" else Path, step, fail)
        with pytest.raises(type(error)):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_permissions_any_other_would_get(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_file(tmp_path / "file", b"")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
        assert os.umask(mask) == mask  # looked at, not changed
    finally:
        os.umask(before)


def test_a_folder_that_does_not_exist_cannot_be_flushed(tmp_path: Path) -> None:
    sync(tmp_path)
    if os.name == "posix":
        with pytest.raises(FileNotFoundError):
            sync(tmp_path / "nowhere")


# Directories --------------------------------------------------------------------------------------

OLD, NEW = {"weights": b"old", "config": b"rank 3"}, {"weights": b"new", "config": b"rank 5"}


def contents(directory: Path) -> dict[str, bytes] | None:
    if not directory.exists():
        return None
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name[0] != "."}


def at_every_line(act: Callable[[], object], look: Callable[[], object]) -> list[Any]:
    """What a reader sees before each line that Python executes: what a crash there would leave."""
    seen = []

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            seen.append(look())
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return [*seen, look()]


def test_a_new_directory_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "adapter"
    seen = at_every_line(lambda: write_directory(directory, NEW), lambda: contents(directory))
    assert len(seen) > 100
    assert all(found in (None, NEW) for found in seen)
    assert seen[-1] == NEW
    assert list(directory.parent.iterdir()) == [directory]


def test_files_that_belong_together_are_never_mixed(tmp_path: Path) -> None:
    write_directory(tmp_path / "a", OLD | {"other": b"stays"})
    seen = at_every_line(
        lambda: write_directory(tmp_path / "a", NEW), lambda: contents(tmp_path / "a")
    )
    for found in seen:
        pair = {found["weights"], found.get("config")}  # without its last file it is no adapter
        assert pair in ({b"old", b"rank 3"}, {b"new", b"rank 5"}) or None in pair
    assert seen[-1] == NEW | {"other": b"stays"}
    assert sum("config" not in found for found in seen) < len(seen) / 4


def test_where_one_file_changes_there_is_no_moment_without_it(tmp_path: Path) -> None:
    """The adapter of a run that found a better one: its configuration is the same."""
    write_directory(tmp_path / "a", OLD)
    better = OLD | {"weights": b"better"}
    seen = at_every_line(
        lambda: write_directory(tmp_path / "a", better), lambda: contents(tmp_path / "a")
    )
    assert all(found in (OLD, better) for found in seen)
    assert seen[-1] == better


@pytest.mark.parametrize("name", ["weights", "part"])
def test_a_name_that_is_taken_leaves_the_old_files(name: str, tmp_path: Path) -> None:
    write_directory(tmp_path / "a", OLD)
    if name == "weights":
        (tmp_path / "a" / name).unlink()
        (tmp_path / "a" / name).mkdir()
    else:
        (tmp_path / "a" / name).write_bytes(b"a file")
    with pytest.raises(OSError, match=name):
        write_directory(tmp_path / "a", {"part/weights": b"new", **NEW})
    assert (tmp_path / "a" / "config").read_bytes() == OLD["config"]


def test_a_directory_is_removed_in_one_moment(tmp_path: Path) -> None:
    write_directory(tmp_path / "a", OLD)
    seen = at_every_line(lambda: remove_directory(tmp_path / "a"), lambda: contents(tmp_path / "a"))
    assert all(found in (None, OLD) for found in seen)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_directory_that_is_exchanged_can_be_put_back_at_every_moment(tmp_path: Path) -> None:
    """What `sweep` makes of a crash at each line: the old one or the new one, and no litter."""
    write_directory(tmp_path / "model", OLD)
    write_directory(tmp_path / ".model.partial", NEW)

    def crashed() -> tuple[list[str], dict[str, bytes] | None]:
        trace = sys.gettrace()
        sys.settrace(None)
        copy = tmp_path.with_name("copy")
        shutil.copytree(tmp_path, copy)
        sweep(copy)
        found = sorted(path.name for path in copy.iterdir()), contents(copy / "model")
        shutil.rmtree(copy)
        sys.settrace(trace)
        return found

    seen = at_every_line(
        lambda: put_directory(tmp_path / ".model.partial", tmp_path / "model"), crashed
    )
    assert all(names == ["model"] and found in (OLD, NEW) for names, found in seen)
    assert seen[0][1] == OLD
    assert seen[-1][1] == NEW
