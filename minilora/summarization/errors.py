"""Bad input ends in one line on standard error and an exit code."""

import io
import signal
import sys
from collections.abc import Callable

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


def run(program: str, main: Callable[[], int | None]) -> int:
    """Run an entry point: an expected error becomes one line. Returns the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set while PyTorch was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # characters the terminal cannot encode become ?
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return main() or 0
    except (*EXPECTED, LostPeer, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        print(f"{program}: {'interrupted' if interrupted else one_line(error)}", file=sys.stderr)
        return exit_code(error)
