"""Reading and writing a run's JSON files, and directories that a crash leaves complete."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.files import PARTIAL, sync, write_file

from .errors import UserError

OLD = ".old" + PARTIAL


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: does not contain a JSON object")
    return content


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """An atomic file write; a symbolic link stays, and what it leads to is replaced.

    Raises:
        OSError: the file cannot be written; the old one is unchanged.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    # A lone surrogate has no UTF-8. What Python writes for it here is also JSON's escape.
    write_file(path.resolve(), text.encode("utf-8", "backslashreplace"))


def remove_directory(directory: Path) -> None:
    """Remove a directory in one step: it is renamed first, so a crash leaves all of it or none."""
    renamed = directory.with_name(f".{directory.name}{PARTIAL}")
    shutil.rmtree(renamed, ignore_errors=True)
    directory.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def put_directory(new: Path, directory: Path) -> None:
    """Replace a directory, if there is one, by a complete new one.

    Between the two renames there is none. After a crash then, `sweep` restores the old one.
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
    """Remove what killed writers left below a directory. No other process may be writing."""
    for old in directory.rglob(f".*{OLD}"):
        if not (place := old.with_name(old.name[1 : -len(OLD)])).exists():
            old.rename(place)
    for path in sorted(directory.rglob(f".*{PARTIAL}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
