"""Atomic file writes. Unfinished files have names that begin with a dot and end in .partial."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PARTIAL = ".partial"


def write_file(path: Path, content: bytes) -> None:
    """Write a temporary file, flush it, rename it: afterwards the file is either old or new.

    Raises:
        OSError: the directory cannot be written or the disk is full; the old file is untouched.
    """
    with _staged(path.parent, {path.name: content}) as new:
        (new / path.name).replace(path)


def write_directory(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files that belong together: a reader never sees some old and some new ones.

    A name may have one directory before it: "prompt/adapter_config.json".

    A new directory is filled under a temporary name and renamed, so it has all its files or does
    not exist. In an existing one, unchanged files are left alone, and one that differs is replaced
    in one step. If several differ, the last of `contents` is removed first and written last: in
    between, the directory lacks this file instead of being a mixture.

    Raises:
        OSError: the directory cannot be written, a name in it is that of a directory, or the disk
            is full. The old files are untouched, unless the renaming itself fails: then the last of
            `contents` is missing.
    """
    if not directory.exists():
        with _staged(directory.parent, contents) as new:
            new.rename(directory)
        return
    changed = {name: c for name, c in contents.items() if not _holds(directory / name, c)}
    with _staged(directory, changed) as new:
        moves = [(new / name, directory / name) for name in changed]
        for _, path in moves:
            path.parent.mkdir(exist_ok=True)
        if len(moves) > 1:
            moves[-1][1].unlink(missing_ok=True)
        for staged, path in moves:
            staged.replace(path)


@contextmanager
def _staged(place: Path, contents: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary directory in `place` with these files, flushed; removed after the block."""
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(PARTIAL, ".", place) as private:
        new = Path(private) / "new"
        new.mkdir()  # with the usual permissions: only the owner can read a TemporaryDirectory
        for name, content in contents.items():
            (new / name).parent.mkdir(exist_ok=True)
            with (new / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for folder in {(new / name).parent for name in contents} | {new}:
            sync(folder)
        yield new
        sync(place)


def _holds(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content  # raises if it is a directory


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries: a rename survives a power cut then (POSIX only)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
