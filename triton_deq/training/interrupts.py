"""SIGINT and SIGTERM as a question that the trainer asks between steps."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """While it is entered, a signal sets `asked` instead of raising. A second SIGINT raises at once.

    Outside of the main thread Python sets no handlers, and signals do as ever.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
