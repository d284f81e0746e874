"""Writing files so that a reader, or a crash, never meets half of one."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: afterwards the file is old or new, never between.

    Raises:
        OSError: the directory cannot be written or the disk is full; the old file is untouched.
    """
    write_files({path: content})


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: none is renamed before all of them are on the disk.

    Raises:
        OSError: a directory cannot be written or the disk is full; the old files are untouched.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            staged.append((Path(name), path))
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o666 & ~_umask())  # mkstemp's 0600 would hide a run from colleagues
        for beside, path in staged:
            beside.replace(path)
    except BaseException:
        for beside, _ in staged:
            beside.unlink(missing_ok=True)
        raise
    for directory in {path.parent for path in contents}:
        sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power cut (POSIX only)."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
