"""One run in a directory at a time, even after a run that was killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: no lock there
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


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
    if fcntl is None:
        yield
        return
    path = directory / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode(errors="replace").strip() or "?"
            os.close(descriptor)
            raise UserError(
                f"{directory}: process {pid} is training into it: wait until it ends, stop it "
                f"(kill {pid}), or name another directory"
            ) from None
        except OSError:  # a file system without locks
            pass
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # its holder removed it between our opening and our locking
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        with suppress(OSError):  # such as a disk that became read-only
            path.unlink(missing_ok=True)  # while it is still locked: see _is_at
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
