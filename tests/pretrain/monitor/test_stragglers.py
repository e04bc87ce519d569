"""What of a step counts as a rank's own work."""

from __future__ import annotations

import time

import pytest
import torch

from amfm.model.parallel.waits import waiting
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


def test_what_is_waited_for_inside_the_passes_is_not_a_ranks_own_work() -> None:
    clock = clock_of(torch.device("cpu"))
    for _ in range(2):  # waits of a step are not those of the next
        with waiting():
            time.sleep(0.05)  # no one listens
        began = time.perf_counter()
        with clock:
            time.sleep(0.05)
            with waiting():
                time.sleep(0.2)
        assert 0.05 <= clock.seconds() <= time.perf_counter() - began - 0.2


@pytest.mark.gpu
def test_a_stream_that_waits_for_another_is_not_busy() -> None:
    """A kernel that sleeps in another stream stands for the exchange with a slow rank."""
    clock, exchange = clock_of(torch.device("cuda")), torch.cuda.Stream()
    square = torch.randn(4096, 4096, device="cuda")
    square @ square
    torch.cuda.synchronize()
    with clock:
        square @ square
        with torch.cuda.stream(exchange):
            torch.cuda._sleep(2_000_000_000)  # cycles: a second
        with waiting():
            torch.cuda.current_stream().wait_stream(exchange)
        square @ square
    torch.cuda.synchronize()
    assert clock.seconds() < 0.3


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
    assert not torch.cuda.current_stream().query(), "the GPU is done before the host has queued: make it more"
    assert clock.seconds() * 1e3 >= first.elapsed_time(last)
