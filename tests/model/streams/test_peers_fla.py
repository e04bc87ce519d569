"""The mixture is that of flash-linear-attention's operation in PyTorch, times the number of sources, with every gradient."""

from __future__ import annotations

import pytest
import torch

from amfm.model.config.streams import AttentionResidualsConfig
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.streams.attention_residuals import AttentionResiduals
from tests.helpers.numbers import assert_all_near
from tests.model.small_models import small_config

naive = pytest.importorskip(
    "fla.ops.attnres.naive", reason="flash-linear-attention (fla) with attnres is not installed"
)
FLOAT32 = 2e-6  # theirs computes in it


@pytest.mark.parametrize("num_sources", [1, 2, 5])
def test_the_mixture_and_its_gradients_are_those_of_the_peer(num_sources: int) -> None:
    config = small_config("M*E-M")
    reader = AttentionResiduals(AttentionResidualsConfig(blocks_per_source=1), 2, config, single_rank_groups())
    generator = torch.Generator().manual_seed(num_sources)
    query, weight = (torch.randn(12, generator=generator).requires_grad_() for _ in range(2))
    sources = torch.randn(num_sources, 2, 63, 12, generator=generator).requires_grad_()
    pull = torch.randn(2, 63, 12, generator=generator)
    reader.query, reader.weight = torch.nn.Parameter(query.detach()), torch.nn.Parameter(weight.detach())
    stacked = sources.detach().permute(1, 2, 0, 3).requires_grad_()
    running = stacked[:, :, -1] if num_sources > 1 else None
    own = reader(stacked[:, :, :-1] if num_sources > 1 else stacked, running)
    peer = num_sources * naive.naive_attnres(query, sources, weight, rms_eps=config.norm_epsilon)
    assert_all_near([own], [peer], FLOAT32)
    ours = torch.autograd.grad((own * pull).sum(), (stacked, reader.query, reader.weight))
    theirs = torch.autograd.grad((peer * pull).sum(), (sources, query, weight))
    found = [ours[0].permute(2, 0, 1, 3), *ours[1:]]
    # With one source its weight is one, whatever the query is.
    assert_all_near(found[: 3 if num_sources > 1 else 1], list(theirs)[: 3 if num_sources > 1 else 1], FLOAT32)
