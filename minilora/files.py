"""Atomic file writes. An unfinished file has a name that begins with a dot and ends in .partial."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

PARTIAL = ".partial"


def write_file(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: afterwards the file is old or new, never between.

    Raises:
        OSError: the directory cannot be written or the disk is full; the old file is untouched.
    """
    _replace({path: content})


def write_directory(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files that belong together: a reader never sees some old and some new ones.

    A new directory is filled beside and renamed, so that it is there with all its files or not at
    all. In one that is there already, files that stay the same are left alone; where one differs,
    it is replaced in one step; where several do, the last of `contents` is taken away first and
    comes last, so that in between the directory lacks it instead of being a mixture.

    Raises:
        OSError: the directory cannot be written or the disk is full; the old files are untouched.
    """
    if directory.exists():
        _replace({directory / n: c for n, c in contents.items() if not _holds(directory / n, c)})
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(PARTIAL, f".{directory.name}.", directory.parent))
    try:
        beside.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would hide a run from colleagues
        _replace({beside / name: content for name, content in contents.items()})
        beside.rename(directory)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync(directory.parent)


def _replace(contents: Mapping[Path, bytes]) -> None:
    """Put files in place, none before all of them are on the disk; the last seals the others."""
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)
            staged[path] = Path(name)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            staged[path].chmod(0o666 & ~_umask())  # as for directories
        if len(contents) > 1:
            list(contents)[-1].unlink(missing_ok=True)
        for path, beside in staged.items():
            beside.replace(path)
    except BaseException:
        for beside in staged.values():
            beside.unlink(missing_ok=True)
        raise
    for directory in {path.parent for path in contents}:
        sync(directory)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries: a rename survives a power cut then (POSIX only)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
