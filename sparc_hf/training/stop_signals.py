"""SIGTERM and Ctrl-C as a wish to stop, so that a run can save what it has first."""

import signal
import threading
from types import TracebackType
from typing import Any


class TrainingInterrupted(RuntimeError):
    """The run was told to stop (SIGTERM or Ctrl-C), saved a checkpoint and left.

    Attributes:
        signal_number: the signal that asked for it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class StopSignals:
    """Notes SIGTERM and Ctrl-C instead of dying of them, while its `with` block runs in the main thread.

    Attributes:
        number: the signal that came last, 0 where none did.
    """

    def __init__(self):
        self.number = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.number = 0
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
