"""Signals: SIGTERM and SIGUSR1 ask the run to save and stop at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class SignalWatch:
    """Context manager inside which the watched signals are remembered instead of ending the process.

    `received` is the number of the last one, 0 for none; ranks may differ and must agree before they act on it. Only the
    main thread of a process may enter.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        for number in WATCHED:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number


def signal_name(number: int) -> str:
    """Name a signal by its number: SIGTERM for 15."""
    return signal.Signals(number).name
