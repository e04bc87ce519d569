"""Ctrl-C at a launcher whose ranks a keyboard does not reach: the first one lets them save and end, as SIGTERM does."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from amfm.launch.cluster.local import FORWARDED, forward_signals
from amfm.launch.cluster.supervise import Outcome
from amfm.launch.console import say
from amfm.pretrain.launcher_protocol import INTERRUPTED


class Interrupt:
    """Whether Ctrl-C came while an attempt ran, and what its outcome is then."""

    def __init__(self) -> None:
        self.came = False

    def translate(self, number: int) -> int:
        """The signal that ranks get for one that came here. Raises KeyboardInterrupt for the second Ctrl-C."""
        if number != signal.SIGINT:
            return number
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        say("amfm launch: interrupted; the ranks save and end (Ctrl-C again ends them immediately)")
        return signal.SIGTERM

    def outcome(self, ended: Outcome) -> Outcome:
        """The outcome of the attempt: after Ctrl-C no other one follows, however its ranks ended."""
        return Outcome(INTERRUPTED) if self.came else ended


@contextmanager
def forward_to_ranks(forward: Callable[[int], None]) -> Iterator[Interrupt]:
    """Inside the block, hand SIGTERM, SIGUSR1 and SIGHUP to `forward`, and the first Ctrl-C as SIGTERM."""
    interrupt = Interrupt()
    with forward_signals(lambda number: forward(interrupt.translate(number)), (*FORWARDED, signal.SIGINT)):
        yield interrupt
