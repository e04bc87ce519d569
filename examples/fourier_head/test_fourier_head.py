"""The Fourier head is the published density, gives unseen bins what their neighbours have, and serves a whole model."""

from __future__ import annotations

import math

import pytest
import torch
from amfm_fourier_head.head import FLOOR, FourierHead, FourierModel
from torch import Tensor, nn

from amfm.model.config.attention import AttentionConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.packing import PackMeta

BINS, N = 24, 5


def reference(head: FourierHead, hidden_RD: Tensor) -> Tensor:
    """The density from autocorrelations, a bin after the other."""
    a = torch.complex(*(hidden_RD @ head.weight.T + head.bias).chunk(2, dim=-1))
    c = [(a[:, : N + 1 - k].conj() * a[:, k:]).sum(-1) for k in range(N + 1)]
    columns = []
    for z in ((2 * b + 1) / BINS - 1 for b in range(BINS)):
        wave = sum(
            (c[k] / c[0] * complex(math.cos(math.pi * k * z), math.sin(math.pi * k * z))).real for k in range(1, N + 1)
        )
        columns.append(0.5 + wave + FLOOR)
    density = torch.stack(columns, -1)
    return (density / density.sum(-1, keepdim=True)).log()


def test_it_is_the_published_density_with_gradients() -> None:
    head = FourierHead(7, BINS, N, torch.Generator().manual_seed(0)).double()
    hidden_RD = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    found, expected = head(hidden_RD), reference(head, hidden_RD)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    leaves = [hidden_RD, head.weight, head.bias]
    wanted = torch.autograd.grad(expected[:, 3].sum(), leaves)
    for actual, right in zip(torch.autograd.grad(found[:, 3].sum(), leaves), wanted):
        torch.testing.assert_close(actual, right, rtol=1e-7, atol=1e-8)


def test_bins_between_those_seen_get_what_their_neighbours_have() -> None:
    hidden = torch.ones(1, 4)
    shape = torch.softmax(-0.5 * ((torch.arange(BINS) - 9.0) / 3.0) ** 2, 0)
    seen = shape * (torch.arange(BINS) % 2 == 0)
    losses = {}
    for name in ("fourier", "linear"):
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Linear(4, BINS), nn.LogSoftmax(-1))
        head = FourierHead(4, BINS, N, torch.Generator().manual_seed(0)) if name == "fourier" else linear
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        for _ in range(80):
            loss = -(head(hidden)[0] * seen).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = float(-(head(hidden)[0] * (shape - seen)).sum() / (shape - seen).sum())
    assert losses["fourier"] < losses["linear"] - 1


def test_a_model_has_it_in_training_and_decoding() -> None:
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4)
    config = ModelConfig(pattern="*", vocab_size=BINS, hidden_size=8, tie_embeddings=False, attention=attention)
    model = FourierModel(config, num_frequencies=N)
    tokens, meta = torch.arange(10)[None], PackMeta.one_document_a_row(1, 10)
    labels = torch.full((1, 10), -100)
    labels[0, 4] = 7
    log_p = model(tokens, meta).logits_BTV
    output = model(tokens, meta, labels, predicts=True)
    torch.testing.assert_close(output.loss.total, -log_p[0, 4, 7])
    assert torch.equal(output.predictions_BT, log_p.argmax(-1))
    output.loss.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    state, pieces = model.empty_state(1), []
    for start, end in ((0, 6), (6, 7), (7, 10)):
        part = model(tokens[:, start:end], PackMeta.one_document_a_row(1, end - start, start=start), state=state)
        state = part.state
        pieces.append(part.logits_BTV)
    torch.testing.assert_close(torch.cat(pieces, 1), log_p, rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4)
    tied = ModelConfig(pattern="*", vocab_size=BINS, hidden_size=8, tie_embeddings=True, attention=attention)
    with pytest.raises(ValueError, match="use tie_embeddings: false"):
        FourierModel(tied, num_frequencies=N)
    with pytest.raises(ValueError, match=r"num_frequencies=12 must be above 0 and below half of the 24 bins"):
        FourierHead(4, BINS, 12, torch.Generator())
