"""Contestants in processes of their own that compute in turns.

Memory can be compared only between processes, and times only within the same minutes. So each
contestant gets a process, is loaded, and waits. The parent lets one after the other compute, round
by round; the others wait.

    parent                                worker, in `work(turns, *arguments)`
    contestant = Contestant(name, work)   turns.answer(facts)           loaded and ready
    contestant.facts
    contestant.turn(word)                 turns.wait() -> word
                                          turns.answer(measured)
"""

import ctypes
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# A waiting process must not spin. Each worker reads these variables at its start.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Turns:
    """The worker's end."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def answer(self, value: Any) -> None:
        self.connection.send(("answer", value))

    def wait(self) -> Any:
        """Wait for the next turn, and return free memory to the system before. Returns the word."""
        trim()
        return self.connection.recv()


class Contestant:
    """The parent's end: a process, started here, and its first answer.

    Args:
        name: for messages.
        work: a function of a module, called in the process with a `Turns` and the arguments.

    Raises:
        RuntimeError: the process failed; its traceback is in the message.
    """

    def __init__(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        os.environ.update({key: os.environ.get(key, ENVIRONMENT[key]) for key in ENVIRONMENT})
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, arguments), name=name)
        self.process.start()
        theirs.close()
        try:
            self.facts: Any = self._receive()
        except RuntimeError:
            self.end()
            raise

    def turn(self, word: Any = None) -> Any:
        """Give it the turn and wait for its answer."""
        self.connection.send(word)
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"{self.name} ended with exit code {code}, without a word") from None
        if kind == "failed":
            raise RuntimeError(f"{self.name} failed:\n{value}")
        return value

    def end(self) -> None:
        self.connection.close()
        self.process.join(timeout=0.1)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _serve(connection: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(Turns(connection), *arguments)
    except (EOFError, KeyboardInterrupt):  # the parent has ended, or ends this process
        pass
    except BaseException:
        connection.send(("failed", traceback.format_exc()))


@contextmanager
def contestants(
    works: Mapping[str, tuple[Callable[..., None], tuple[Any, ...]]],
) -> Iterator[dict[str, Contestant]]:
    """Start one after the other, so that only one loads at a time; end all of them."""
    started: dict[str, Contestant] = {}
    try:
        for name, (work, arguments) in works.items():
            started[name] = Contestant(name, work, *arguments)
        yield started
    finally:
        for contestant in started.values():
            contestant.end()


def rounds(
    started: Mapping[str, Contestant], number: int, word: Callable[[int], Any] = lambda _: None
) -> dict[str, list[Any]]:
    """In each round every contestant has one turn, in rotating order. Returns their answers."""
    names = list(started)
    answers: dict[str, list[Any]] = {name: [] for name in names}
    for i in range(number):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            answers[name].append(started[name].turn(word(i)))
    return answers


# Memory of the process ----------------------------------------------------------------------------


def reset_peak(device: str) -> None:
    """Start counting the peak here, so that loading does not count."""
    trim()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # otherwise the peak includes loading, for all contestants
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Peak memory since `reset_peak`: of the GPU's allocator, or resident memory of this process.

    It is not getrusage's ru_maxrss, because a new process inherits its parent's.
    """
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM:")


def resident_bytes() -> int:
    return _status("VmRSS:")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def trim() -> None:
    """Return freed memory to the system (glibc), so that a waiting process holds little."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
