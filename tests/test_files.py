"""Files are old or new, never between."""

import os
import stat
from pathlib import Path

import pytest

from minilora.files import sync_directory, write_file


def test_a_file_is_written_whole_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_file(path, b"one\0two")
    assert path.read_bytes() == b"one\0two"
    write_file(path, b"")
    assert path.read_bytes() == b""
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "fdopen", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "replace", fail) if step == "replace" else (os, step, fail)))
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
    sync_directory(tmp_path)
    if os.name == "posix":
        with pytest.raises(FileNotFoundError):
            sync_directory(tmp_path / "nowhere")
