"""Contestants in processes of their own that compute by turns.

Memory can be compared between processes only, times within the same minutes only. So each
contestant gets a process, is loaded, and waits; the parent gives the word to one after the other,
round by round, and who has not got it computes nothing.

    parent                                worker, in `work(turns, *arguments)`
    contestant = Contestant(name, work)   turns.answer(facts)           loaded and ready
    contestant.facts
    contestant.turn(word)                 turns.wait() -> word
                                          turns.answer(what it measured)
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

# A waiting process must not spin; each worker reads these as it starts.
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
        """The parent's next word; memory that is free goes back to the system meanwhile."""
        trim()
        return self.connection.recv()


class Contestant:
    """The parent's end: a process, started here, and what it said when it was ready.

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
        """Give it the word; returns its answer, and nobody computes before that."""
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
    except (EOFError, KeyboardInterrupt):  # the parent has gone, or wants us gone
        pass
    except BaseException:
        connection.send(("failed", traceback.format_exc()))


@contextmanager
def contestants(
    works: Mapping[str, tuple[Callable[..., None], tuple[Any, ...]]],
) -> Iterator[dict[str, Contestant]]:
    """Start one after the other, so that none is loaded while another is; end them all."""
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
    """Each round gives everybody the word once, in an order that rotates; their answers."""
    names = list(started)
    answers: dict[str, list[Any]] = {name: [] for name in names}
    for i in range(number):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            answers[name].append(started[name].turn(word(i)))
    return answers


# Memory of the process ----------------------------------------------------------------------------


def reset_peak(device: str) -> None:
    """From here on the peak is counted: what loading took before is left out, for all alike."""
    trim()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # then the peak is that of the whole process, for all alike
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Most memory since `reset_peak`: of the GPU's allocator, or resident, of this process.

    Not getrusage's ru_maxrss: a started process inherits its parent's.
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
    """Give freed memory back (glibc), so that a waiting process holds what it needs only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
