"""Ctrl-C and SIGTERM: a run stops after the current step, and at once where that is safe."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from .. import processes


class StopRequest:
    """Whether Ctrl-C or SIGTERM came. A second one stops at once.

    With several processes all stop at the same step. A second signal is ignored then: Ctrl-C in a
    terminal reaches each process twice, once through torchrun.
    """

    requested = False
    raises = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block a request, even one made before, raises KeyboardInterrupt.

        With several processes it is raised at the end of the block, in all: a process that left a
        collective call would hang the others.
        """
        self.raises = True
        try:
            self._raise_if(self.requested)
            yield
        finally:
            self.raises = False
        if processes.any_rank(self.requested):
            raise KeyboardInterrupt

    def on_signal(self, number: int, frame: object) -> None:
        second, self.requested = self.requested, True
        self._raise_if(second or self.raises)

    def _raise_if(self, now: bool) -> None:
        if now and processes.world_size() == 1:
            raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the current step."""
    stop = StopRequest()
    handled = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, stop.on_signal) for number in handled}
    except ValueError:  # signals come to the main thread only
        before = {}
    try:
        yield stop
    except BaseException:
        if processes.active():  # so that torchrun's SIGTERM does not cut off the error message
            before = {}
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
