"""One run in a directory at a time, even after a run that was killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Make a directory, and keep other runs out of it inside the block.

    The lock is the kernel's (flock) on a file that holds the process id. It ends with the process,
    however that dies, so the file of a killed run locks nothing.

    Raises:
        UserError: another process holds it; its id is named.
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    try:
        held = FileLock(path).acquire(blocking=False)
    except Timeout:
        pid = path.read_text() or "?"
        raise UserError(
            f"{directory}: process {pid} is already training in this directory: wait for it to "
            f"finish, stop it (kill {pid}), or choose another --output"
        ) from None
    with held:
        try:
            path.write_text(str(os.getpid()))
            yield
        finally:
            with suppress(OSError):  # such as a disk that became read-only
                path.unlink()  # while it is still locked: nobody else loses theirs
