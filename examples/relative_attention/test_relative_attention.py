"""Relative positions are the sums of their formula, keep documents apart, decode with a cache, and reject what they cannot do."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest
import torch
from amfm_relative_attention import mixer as module
from amfm_relative_attention.mixer import RelativeAttentionMixer
from amfm_relative_attention.spec import SPEC, RelativeAttentionOptions
from torch import Tensor

from amfm.model.config.schema import RegisteredMixers
from amfm.model.mixers.interface import BuildContext
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups

H, K, W = 2, 6, 5


@pytest.fixture
def mixer() -> RelativeAttentionMixer:
    build = BuildContext(10, 1e-5, 0, 1, single_rank_groups(), "torch", RegisteredMixers())
    made = RelativeAttentionMixer(RelativeAttentionOptions(num_heads=H, head_dim=K, max_distance=W), build).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def reference(mixer: RelativeAttentionMixer, x_TD: Tensor) -> Tensor:
    """One document, a pair of tokens after the other."""
    q, k, v = ((x_TD @ w.T).unflatten(-1, (H, K)) for w in mixer.in_proj.weight.chunk(3))
    rows = []
    for i in range(len(x_TD)):
        heads = []
        for h in range(H):
            vectors = [k[j, h] + mixer.distance_vectors[h, min(i - j, W - 1)] for j in range(i + 1)]
            scores = torch.stack([q[i, h] @ vector for vector in vectors]) / K**0.5
            heads.append(scores.softmax(0) @ v[: i + 1, h])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ mixer.out_proj.weight.T


def test_it_is_the_sum_over_pairs_of_each_document_with_gradients(mixer: RelativeAttentionMixer) -> None:
    x_BTD = torch.randn(1, 17, 10, dtype=torch.float64, requires_grad=True)
    packed = PackMeta.from_document_ids(torch.tensor([[0] * 4 + [1] * 13]))
    found = mixer(x_BTD, packed).y_BTD
    expected = torch.cat([reference(mixer, x_BTD[0, :4]), reference(mixer, x_BTD[0, 4:])])[None]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    leaves = [x_BTD, *mixer.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for actual, right in zip(torch.autograd.grad(found.square().sum(), leaves), wanted):
        torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-9)


def test_decoding_goes_on_with_the_keys_so_far(mixer: RelativeAttentionMixer) -> None:
    x_BTD = torch.randn(1, 13, 10, dtype=torch.float64)
    whole = mixer(x_BTD, PackMeta.one_document_a_row(1, 13)).y_BTD
    state, pieces = mixer.empty_state(1), []
    for start, end in ((0, 7), (7, 8), (8, 13)):
        output = mixer(x_BTD[:, start:end], PackMeta.one_document_a_row(1, end - start, start=start), state)
        state = output.state
        pieces.append(output.y_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)


def test_rows_beyond_its_limit_and_context_ranks_are_refused(
    mixer: RelativeAttentionMixer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 8)
    with pytest.raises(ValueError, match=r"sequences of 9 tokens and takes 8.*shorten train\.sequence_length"):
        mixer(torch.zeros(1, 9, 10, dtype=torch.float64), PackMeta.one_document_a_row(1, 9))
    assert set(SPEC.refuses) == {"context"}


def test_its_entry_point_names_the_spec() -> None:
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    place, _, name = project["entry-points"]["amfm.mixers"]["relative_attention"].partition(":")
    assert getattr(importlib.import_module(place), name) is SPEC and SPEC.load() is RelativeAttentionMixer
