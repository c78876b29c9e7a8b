"""Ctrl-C at a moment when a library cannot be unwound."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Holds a SIGINT back until the block has ended, and then has it handled as if it came then.

    Outside the main thread, which no signal ever interrupts, and where SIGINT is ignored, it changes nothing.

    Yields:
        Nothing, while interrupts are deferred.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])
