"""The tests that need CUDA, beside the measurements of benchmarks/gpu.py."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any

from common import ROOT

TESTS = [
    "tests/test_layer.py::test_a_merged_layer_moved_to_a_device_and_back_unmerges_exactly",
    "tests/test_cuda.py",
]


class Tests:
    """pytest in a process of its own; it runs while this one imports and makes its models."""

    def __init__(self) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*command, *TESTS],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def result(self, deadline: float) -> dict[str, Any]:
        ended = True
        try:
            self.process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            ended = False
            self.end()
        seconds = time.monotonic() - self.began
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        pattern = r"^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
        found = dict(re.findall(pattern, text, re.MULTILINE))
        counts = dict(Counter(found.values()))
        print(text[-3000:] if counts.keys() - {"PASSED", "SKIPPED"} else "", end="")
        print(f"tests: {counts}" + ("" if ended else ", stopped at the time limit"))
        return {
            "counts": counts,
            "ended": ended,
            "exit_code": self.process.returncode if ended else None,
            "seconds": round(seconds, 1),
            "tests": found,
            "output": text[-6000:],
        }

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
