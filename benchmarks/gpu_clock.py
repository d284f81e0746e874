"""The minutes of benchmarks/gpu.py: each part gets its share, and its result is written at once."""

import functools
import gc
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import write_result

# Part: share of the time, and least seconds that it needs on a GPU.
SHARES = {
    "tests": (0.25, 12),
    "layer": (0.12, 6),
    "training_8": (0.24, 15),
    "training_64": (0.18, 12),
    "waits": (0.03, 2),
    "evaluation": (0.18, 8),
    "compiled": (0.40, 60),
}


@dataclass
class Run:
    """What all parts are told, and the clock."""

    device: str
    minutes: float
    out: Path
    small: bool
    scratch: str = field(default_factory=tempfile.mkdtemp)
    start: float = field(default_factory=time.monotonic)
    left: list[str] = field(default_factory=lambda: list(SHARES))
    report: dict[str, str] = field(default_factory=dict)
    partial: dict[str, Any] = field(default_factory=dict)
    """What the running part has measured so far: written if it ends with an error."""

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.start)

    def part(self, name: str, work: Callable[[float], dict[str, Any] | None]) -> None:
        """Give a part its share of what is left and write what it returns, or why it is absent."""
        left = self.seconds_left()
        whole = sum(SHARES[other][0] for other in self.left)
        # Nothing is kept back for a part that would not fit anyway.
        share, least = SHARES[name]
        fitting = [o for o in self.left if left * SHARES[o][0] / whole >= SHARES[o][1]]
        seconds = left * share / sum(SHARES[other][0] for other in {name, *fitting})
        self.left.remove(name)
        least = least if self.cuda else 1
        if seconds < least:
            why = f"skipped: needs {least} s, and its share of the {left:.0f} s left is"
            self.finish(name, {"skipped": f"{why} {max(0, seconds):.0f} s"}, 0.0)
            return
        began = time.monotonic()
        self.partial = {}
        try:
            result = work(began + seconds) or {}
        except Exception as error:  # also out of memory: the next part may fit
            traceback.print_exc()
            result = {**self.partial, "error": f"{type(error).__name__}: {error}"[:2000]}
            result["traceback"] = traceback.format_exc()[-4000:]
        self.finish(name, result, time.monotonic() - began)
        release()

    def finish(self, name: str, result: dict[str, Any], seconds: float) -> None:
        state = result.get("skipped") or result.get("error") or "measured"
        self.report[name] = f"{state} ({seconds:.1f} s)"
        self.write(name, {**result, "seconds_of_part": round(seconds, 1)})
        print(f"== {name}: {self.report[name]}; {self.seconds_left():.0f} s left", flush=True)

    def write(self, name: str, result: dict[str, Any]) -> Path:
        told = {"device": self.device, "minutes": self.minutes, "small": self.small}
        content = {"settings": told, "driver": driver(), **result}
        return write_result(f"gpu_{name}", content, folder=self.out)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@functools.cache
def driver() -> dict[str, Any]:
    """Of the GPU: card, driver, memory, and the CUDA that torch was built for."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        version = found.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        version = "unknown"
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": version,
        "cuda": torch.version.cuda,
    }


def timed(device: str, run: Callable[[], object]) -> float:
    """Seconds from the first kernel to the end of the last, waits between them included."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
