"""Signals that ask the process to end, as an exception of the code that runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["Stopped", "stopping"]


class Stopped(BaseException):
    """The process is asked to end by the signal ``number``."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopping() -> Iterator[None]:
    """Raise :class:`Stopped` on a signal that asks the process to end.

    A second one ends it at once. Signals that the process was started to ignore (``nohup``)
    stay ignored.
    """
    asked = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if threading.current_thread() is not threading.main_thread():
        asked = []  # Python handles signals there alone
    before = {number: signal.getsignal(number) for number in asked}
    handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(signal.Signals(number))

    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])
