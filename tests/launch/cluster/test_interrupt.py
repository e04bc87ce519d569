"""Ctrl-C at a launcher: once is a save everywhere, twice the end, and no attempt follows."""

from __future__ import annotations

import os
import signal

import pytest

from amfm.launch.cluster.supervise import Outcome, forward_to_ranks


def test_the_first_interrupt_lets_ranks_save_and_the_second_ends_the_launcher(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sent: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), forward_to_ranks(sent.append) as interrupt:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupt.outcome(Outcome(3, "lost")) == Outcome(3, "lost")
        os.kill(os.getpid(), signal.SIGINT)
        assert sent == [signal.SIGUSR1, signal.SIGTERM]
        assert interrupt.outcome(Outcome(3, "lost")) == interrupt.outcome(Outcome(0)) == Outcome(130)
        os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again ends them immediately" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
