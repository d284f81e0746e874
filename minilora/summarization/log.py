"""log.jsonl, which a resumed run goes on with, and the clock that goes on too."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from minilora.files import write_file


class Log:
    """log.jsonl: appended to, and on resuming cut back to what the checkpoint had seen."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        content = path.read_bytes()[:keep_bytes] if path.exists() else b""
        if len(content) < keep_bytes:
            missing = keep_bytes - len(content)
            print(f"note: {path} lacks {missing:,} bytes that were written", file=sys.stderr)
        write_file(path, content)
        self.file = path.open("ab")

    def write(self, kind: str, **values: Any) -> None:
        """One record. JSON has no word for infinity or NaN: they become null."""
        record = {"kind": kind} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def flush(self) -> int:
        """The length of the log in bytes, all of it on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class NoLog(Log):
    """That of the processes which do not write."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self.file = Path(os.devnull).open("wb")  # noqa: SIM115

    def flush(self) -> int:
        return 0


class Clock:
    """Seconds of training, those before a resume included."""

    def __init__(self, before: float) -> None:
        self.start = time.monotonic() - before
        self.mark()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def mark(self) -> None:
        self.marked = time.monotonic()

    def minutes_since_mark(self) -> float:
        return (time.monotonic() - self.marked) / 60
