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

        With several processes it is raised at the beginning or at the end of the block, in all of
        them: a process that left a collective call would hang the others.
        """
        self.raises = True
        try:
            self.raise_if_requested()
            yield
        finally:
            self.raises = False
        self.raise_if_requested()

    def raise_if_requested(self) -> None:
        if processes.any_rank(self.requested):
            raise KeyboardInterrupt

    def on_signal(self, *_: object) -> None:
        second, self.requested = self.requested, True
        if (second or self.raises) and processes.world_size() == 1:
            raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the current step.

    A signal that is ignored stays ignored: Ctrl-C is not meant for a run in the background.
    """
    stop = StopRequest()
    signals = (signal.SIGINT, signal.SIGTERM)
    handled = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, stop.on_signal) for number in handled]
    try:
        yield stop
    finally:
        if not processes.active():  # torchrun's SIGTERM would cut off an error message
            for number, handler in zip(handled, before, strict=True):
                signal.signal(number, handler)
