"""Bad input ends in one line on standard error and an exit code."""

import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from minilora import LoRAError


class UserError(ValueError):
    """Bad input: one line that says what is wrong, where and what to do. Ends in exit code 2."""


class LostPeer(RuntimeError):
    """A process of a torchrun job lost contact with another one. Ends in exit code 1."""


EXPECTED = (UserError, LoRAError, OSError)
"""Errors that the user can correct."""


def one_line(error: BaseException, name: bool = False) -> str:
    """The message without line breaks; with the class's name for errors of other libraries."""
    text = " ".join((f"{type(error).__name__}: {error}" if name else str(error)).split())
    return text[:300] if name else text


def counted(number: int, what: str) -> str:
    """As in 1 dialogue, 1,200 dialogues."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def exit_code(error: BaseException) -> int:
    """2 on bad input, 130 when interrupted, else 1."""
    if isinstance(error, EXPECTED):
        return 2
    return 130 if isinstance(error, KeyboardInterrupt) else 1


class Output:
    """Standard output or error. What cannot be written is dropped, so that the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost = False
        """Whether something was dropped, other than for a reader that is gone, as after `head`."""

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _attempt(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:  # from now on it goes nowhere, what Python writes at exit too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not isinstance(error, BrokenPipeError):
                self.lost = True
                why = f"standard output cannot be written ({error.strerror})"
                print(f"note: {why}: what is printed is lost", file=sys.stderr)


def run(program: str, main: Callable[[], int | None]) -> int:
    """Run an entry point: an expected error becomes one line. Returns the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set while PyTorch was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # characters the terminal cannot encode become ?
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:  # where they were closed
        out, err = (Output(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = main() or 0
            except (*EXPECTED, LostPeer, KeyboardInterrupt) as error:
                what = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
                print(f"{program}: {what}", file=sys.stderr)
                code = exit_code(error)
            finally:
                out.flush()
    return code or 2 * out.lost
