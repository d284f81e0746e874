"""Directories that a crash leaves whole: removed, exchanged, swept of what killed writers left."""

import shutil
from pathlib import Path

from minilora.files import PARTIAL, sync

OLD = ".old" + PARTIAL


def remove_directory(directory: Path) -> None:
    """Remove a directory so that a crash leaves it whole or gone: it is renamed first."""
    beside = directory.with_name(f".{directory.name}{PARTIAL}")
    shutil.rmtree(beside, ignore_errors=True)
    directory.rename(beside)
    shutil.rmtree(beside, ignore_errors=True)


def put_directory(new: Path, directory: Path) -> None:
    """Put a directory that others have filled in the place of one that is there, or is not yet.

    Between two renames there is none; `sweep` puts the old one back if a crash came just then.
    """
    for path in new.rglob("*"):
        sync(path)
    old = directory.with_name(f".{directory.name}{OLD}")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove what writers that were killed left below a directory. No other may be writing."""
    for old in directory.rglob(f".*{OLD}"):
        if not (place := old.with_name(old.name[1 : -len(OLD)])).exists():
            old.rename(place)
    for path in sorted(directory.rglob(f".*{PARTIAL}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
