"""The entry points `train.py` and `evaluate.py`: flags, exit codes, processes."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import errors, flags, hub, processes
from .settings import RunConfig


def train_main(argv: Sequence[str] | None = None, program: str = "train.py") -> int:
    """`python train.py ...`. Returns 0, 2 on bad input, 130 when interrupted."""
    return _entry_point(program, flags.parse_run, argv)


def evaluate_main(argv: Sequence[str] | None = None, program: str = "evaluate.py") -> int:
    """`python evaluate.py RUN ...`. Returns 0, 2 on bad input, 130 when interrupted."""
    return _entry_point(program, flags.parse_evaluation, argv)


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Inside the block Ctrl-C ends the process at once.

    KeyboardInterrupt could be raised anywhere in an import, and some packages turn it into other
    errors.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _entry_point(
    program: str, parse: Callable[[Sequence[str], str], Any], argv: Sequence[str] | None
) -> int:
    # Offline it logs every retry; the error that follows is one line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    def main() -> int:
        with processes.join():
            settings = parse(sys.argv[1:] if argv is None else argv, program)
            if isinstance(settings, RunConfig):
                hub.require_model(settings.model.model)
            with _ended_by_ctrl_c():
                from . import commands  # it imports transformers: --help need not wait for that

            command = commands.train if parse is flags.parse_run else commands.score
            return command(settings)

    return errors.run(program, main)
