"""Ctrl-C and SIGTERM: a run stops after the step under way, and where it is safe at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from minilora.summarization import distributed


class StopRequest:
    """Whether Ctrl-C or SIGTERM came. A second one stops at once.

    With several processes all stop at the same step or none, and a second signal says nothing new:
    a terminal's Ctrl-C reaches each of them twice, once through torchrun.
    """

    def __init__(self) -> None:
        self.requested = False
        self.raises = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block a request, also one made before, raises KeyboardInterrupt."""
        self.raises = True
        try:
            if self.requested:
                distributed.interrupt()
            yield
        finally:
            self.raises = False
            distributed.forget_interrupt()

    def on_signal(self, number: int, frame: object) -> None:
        second, self.requested = self.requested, True
        if self.raises or (second and distributed.size() == 1):
            distributed.interrupt()


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step under way."""
    stop = StopRequest()
    handled = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, stop.on_signal) for number in handled}
    except ValueError:  # not in the main thread: nobody sends signals here
        before = {}
    try:
        yield stop
    except BaseException:
        if distributed.active():  # torchrun's SIGTERM may not cut off what the process has to say
            before = {}
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
