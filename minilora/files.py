"""Atomic file writes. What is unfinished has a name that begins with a dot and ends in .partial."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PARTIAL = ".partial"


def write_file(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: afterwards the file is old or new, never between.

    Raises:
        OSError: the directory cannot be written or the disk is full; the old file is untouched.
    """
    with _staged(path.parent, {path.name: content}) as new:
        (new / path.name).replace(path)


def write_directory(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files that belong together: a reader never sees some old and some new ones.

    A name may have one directory before it: "prompt/adapter_config.json".

    A new directory is filled beside and renamed, so that it is there with all its files or not at
    all. In one that is there already, files that stay the same are left alone; where one differs,
    it is replaced in one step; where several do, the last of `contents` is taken away first and
    comes last, so that in between the directory lacks it instead of being a mixture.

    Raises:
        OSError: the directory cannot be written or the disk is full; the old files are untouched.
    """
    if not directory.exists():
        with _staged(directory.parent, contents) as new:
            new.rename(directory)
        return
    changed = {name: c for name, c in contents.items() if not _holds(directory / name, c)}
    with _staged(directory, changed) as new:
        moves = [(new / name, directory / name) for name in changed]
        if len(moves) > 1:
            moves[-1][1].unlink(missing_ok=True)
        for beside, path in moves:
            path.parent.mkdir(exist_ok=True)
            beside.replace(path)


@contextmanager
def _staged(place: Path, contents: Mapping[str, bytes]) -> Iterator[Path]:
    """A directory inside `place` with these files, all on the disk; what the block leaves goes."""
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(PARTIAL, ".", place) as private:
        new = Path(private) / "new"
        new.mkdir()  # readable like any other; the temporary one would hide a run from colleagues
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
    return path.is_file() and path.read_bytes() == content


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries: a rename survives a power cut then (POSIX only)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
