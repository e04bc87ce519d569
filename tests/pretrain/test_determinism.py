"""Library kernels that add in one order: by default on a CPU, where asked elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from amfm.pretrain.parallel import set_determinism


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default there is false")
def test_a_cpu_adds_in_one_order_unless_the_run_says_otherwise() -> None:
    for asked, chosen in ((None, True), (True, True), (False, False)):
        assert set_determinism(3, asked) == chosen
        assert torch.are_deterministic_algorithms_enabled() == chosen


def test_every_generator_starts_alike() -> None:
    drawn = []
    for _ in range(2):
        set_determinism(3)
        drawn.append(torch.randn(4))
    assert torch.equal(*drawn)
