"""A program in a fork of the test, which has imported already what a new process imports first."""

import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryFile

import pytest


def fork(work: Callable[[], int | None]) -> "CompletedProcess[str]":
    """The exit code of `work` and what it prints. Without `os.fork`, the test is skipped."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    with TemporaryFile("w+", encoding="utf-8") as out, TemporaryFile("w+", encoding="utf-8") as err:
        if (child := os.fork()) == 0:
            code = 1
            try:
                for number, file in ((1, out), (2, err)):
                    os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
                code = work() or 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # without pytest's own end
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        return CompletedProcess([], code, out.read(), err.read())


def run_script(script: Path, *argv: object, folder: Path | None = None) -> "CompletedProcess[str]":
    """As `python script *argv` in that folder, but for what is imported already."""

    def work() -> None:
        if folder is not None:
            os.chdir(folder)
        sys.argv = [str(script), *map(str, argv)]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")

    return fork(work)
