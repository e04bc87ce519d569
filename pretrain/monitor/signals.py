"""Signals: SIGTERM, SIGUSR1, SIGHUP (its terminal was closed) and Ctrl-C ask the run to save and stop at the next step boundary.

All but Ctrl-C are noted from the first line of a process on (`note_signals`), before anything heavy is imported;
the watch of the run takes over what came until then.

The first Ctrl-C is answered immediately, in a separate thread: a step may take minutes, and a panel that is being redrawn
is not a place for a handler to write to. A second one ends the process at once, whatever it waits for: after the first
one SIGINT has the system's own action again, which needs no Python. What was saved before stands, as after any kill.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

# Below nohup the run outlives its terminal, and SIGHUP stays ignored.
SAVING = tuple(
    number
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
)
WATCHED = (*SAVING, signal.SIGINT)
ON_INTERRUPT = "Ctrl-C: stopping after this step and saving; Ctrl-C again ends now and loses {lost}"

_noted: list[int] = []


def note_signals() -> None:
    """Remember signals that ask to save instead of ending on them, until `take_noted`. Call it from the main thread."""
    for number in SAVING:
        signal.signal(number, _note)


def take_noted() -> list[int]:
    """The signals noted so far, once; if none replaced it, the system's own action holds again."""
    for number in SAVING:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)
    taken = _noted.copy()
    _noted.clear()
    return taken


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(number)


class SignalWatch:
    """Context manager inside which the watched signals are remembered instead of ending the process.

    `received` is the number of the last one, 0 for none; ranks may differ and must agree before they act on it.
    `announces`: whether this process answers Ctrl-C, as one rank should: by `answer`, on standard error until a display
    takes that over. Only the main thread of a process may enter.
    """

    def __init__(self, *, announces: bool = False) -> None:
        self.received = 0
        self.announces = announces
        self.answer: Callable[[], None] = answer_plainly
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        for number in WATCHED:
            previous = signal.signal(number, self._remember)
            self._previous[number] = signal.SIG_DFL if previous is _note else previous
        for noted in take_noted():
            self._remember(noted, None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note it for the end of the step, and answer a first Ctrl-C."""
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self.announces:
                threading.Thread(target=self.answer, name="answer-to-interrupt", daemon=True).start()


def answer_plainly() -> None:
    """Answer a first Ctrl-C on standard error, if there is no display yet."""
    os.write(
        sys.stderr.fileno(), f"\namfm: {ON_INTERRUPT.format(lost='the steps since the last checkpoint')}\n".encode()
    )


def signal_name(number: int) -> str:
    """Name a signal by its number: SIGTERM for 15."""
    return signal.Signals(number).name
