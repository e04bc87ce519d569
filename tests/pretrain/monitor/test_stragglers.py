"""What of a step counts as a rank's own work."""

from __future__ import annotations

import time

import pytest
import torch

from amfm.pretrain.monitor.stragglers import HostClock, clock_of


def test_the_host_times_what_a_cpu_computes_between_start_and_stop() -> None:
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    clock.start()
    time.sleep(0.05)
    clock.stop()
    taken = clock.seconds()
    time.sleep(0.05)
    assert clock.seconds() == taken >= 0.05


@pytest.mark.gpu
def test_events_time_what_a_card_computes_though_the_host_only_queues_it() -> None:
    clock, square = clock_of(torch.device("cuda")), torch.randn(8192, 8192, device="cuda")
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    clock.start()
    first.record()
    for _ in range(20):
        square @ square
    last.record()
    clock.stop()
    assert not torch.cuda.current_stream().query(), "the card is done before the host has queued: make it more"
    assert clock.seconds() * 1e3 >= first.elapsed_time(last)
