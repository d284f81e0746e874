"""log.jsonl, which a resumed run continues."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from minilora.files import write_file

from .. import processes


class Log:
    """One JSON record per line, appended."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, kind: str, **values: Any) -> None:
        """One record. JSON has no infinity and no NaN: they become null."""
        record = {"kind": kind} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def flush(self) -> int:
        """Write the log to the disk. Returns its length in bytes."""
        if processes.rank() == 0:
            os.fsync(self.file.fileno())
        return self.file.tell()


def tells_of_more(path: Path) -> bool:
    """Whether a log goes on after the first validation, which is followed by a checkpoint."""
    content = path.read_bytes() if path.exists() else b""
    return b'{"kind": "end"' in content or content.count(b'{"kind": "validation"') > 1


@contextmanager
def open_log(path: Path, keep_bytes: int) -> Iterator[Log]:
    """Continue a log after its first `keep_bytes`, those that the checkpoint has seen.

    Only process 0 writes.
    """
    if processes.rank() == 0:
        content = path.read_bytes()[:keep_bytes] if path.exists() else b""
        content = content[: content.rfind(b"\n") + 1]  # no half line
        if missing := keep_bytes - len(content):
            what = f"lost {missing:,} bytes; training goes on, the report lacks those steps"
            print(f"note: {path} {what}", file=sys.stderr)
        write_file(path, content)
    with (path if processes.rank() == 0 else Path(os.devnull)).open("ab") as file:
        yield Log(file)
