"""Rotary positions of mixers that forget nothing: the sums of their formulas, and what a shift of the text changes."""

from __future__ import annotations

import pytest
import torch
from amfm_mixers.feature_maps import FeatureMapMixer
from torch import Tensor

from amfm.kernels.rope.op import norm_rope_reference
from amfm.model.packing import PackMeta
from tests.helpers.numbers import assert_near
from tests.model.mixers.samples import ROTARY_FORMS, sample_options
from tests.model.small_models import meta_of, packed_batch, small_config, small_model

EXACT = 1e-10  # float64: the same sums in another order
DOCUMENTS = ((7, 1, 13, 3), (24,))


def mixer_of(name: str, positions: str) -> FeatureMapMixer:
    options = sample_options(name) | {"positions": positions, "rope_theta": 100.0, "conv_kernel": 0}
    model = small_model(small_config(f"{{{name}}}", mixers={name: options}))
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, FeatureMapMixer)
    return mixer


def over_all_pairs(name: str, positions: str, mixer: FeatureMapMixer, x_BTD: Tensor, meta: PackMeta) -> Tensor:
    """The output with weights of all pairs of tokens."""
    q, k, v = ((x_BTD @ w.T).unflatten(-1, (4, -1)) for w in mixer.in_proj.weight.split([24, 24, 20]))

    def rotate(x: Tensor) -> Tensor:
        return norm_rope_reference(x, meta.positions_BT, mixer.inverse_frequencies, 1.0, None, 0.0)

    if positions == "rope_before":
        q, k = rotate(q), rotate(k)
    if name == "hedgehog":
        q, k = (
            torch.cat([torch.softmax(sign * torch.einsum("bthk,hjk->bthj", x, weight), -1) for sign in (1, -1)], -1)
            for x, weight in ((q, mixer.query_features), (k, mixer.key_features))
        )
    else:
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    if positions == "rope_after":
        q, k = rotate(q), rotate(k)
    seen = (meta.document_ids_BT[:, :, None] == meta.document_ids_BT[:, None]).tril()[..., None]
    weights = torch.where(seen, torch.einsum("bihk,bjhk->bijh", q, k), 0.0)
    total = weights.sum(2)[..., None]
    o = torch.einsum("bijh,bjhv->bihv", weights, v)
    if name == "hedgehog":
        return (o / total).flatten(2) @ mixer.out_proj.weight.T
    if name == "mala":
        mean = torch.einsum("bij,bjhv->bihv", seen[..., 0].double(), v) / seen.sum(2)[..., None]
        o = (1 + 1 / total) * o - total * mean
    o = o / (o.square().mean(-1, keepdim=True) + mixer.build.norm_epsilon).sqrt() * mixer.norm.weight
    return o.flatten(2) @ mixer.out_proj.weight.T


@pytest.mark.parametrize(("name", "positions"), ROTARY_FORMS)
def test_a_scan_gives_what_the_sum_over_all_pairs_gives_with_gradients(name: str, positions: str) -> None:
    meta = meta_of(packed_batch(DOCUMENTS)[2])
    mixer = mixer_of(name, positions)
    x_BTD = torch.randn(2, 24, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    leaves = [x_BTD, *mixer.parameters()]
    y_BTD, expected = mixer(x_BTD, meta).y_BTD, over_all_pairs(name, positions, mixer, x_BTD, meta)
    assert_near(y_BTD, expected, EXACT, "outputs")
    weight = torch.linspace(-1, 1, y_BTD.numel(), dtype=torch.float64).view_as(y_BTD)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for actual, right in zip(torch.autograd.grad((y_BTD * weight).sum(), leaves), wanted):
        assert_near(actual, right, EXACT, "gradients")


def test_rotated_after_the_features_a_shift_of_the_text_changes_nothing_and_before_them_a_little() -> None:
    x_BTD = torch.randn(1, 24, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    moved = {}
    for positions in ("rope_after", "rope_before"):
        mixer = mixer_of("transnormer", positions)
        first, shifted = (mixer(x_BTD, PackMeta.one_document_a_row(1, 24, start=start)).y_BTD for start in (0, 7))
        moved[positions] = float((shifted - first).norm() / first.norm())
    assert moved["rope_after"] < 1e-6 < 1e-3 < moved["rope_before"]


@pytest.mark.parametrize(("name", "positions"), ROTARY_FORMS)
def test_decoding_goes_on_with_the_positions_so_far(name: str, positions: str) -> None:
    options = sample_options(name) | {"positions": positions}
    model = small_model(small_config(f"{{{name}}}" * 2, mixers={name: options})).eval()
    tokens_BT = packed_batch(((24,),))[0]
    with torch.no_grad():
        whole_BTV = model(tokens_BT, PackMeta.one_document_a_row(1, 24)).logits_BTV
        state, pieces, start = model.empty_state(1), [], 0
        for length in (9, 1, 1, 13):
            meta = PackMeta.one_document_a_row(1, length, start=start)
            output = model(tokens_BT[:, start : start + length], meta, state=state)
            pieces.append(output.logits_BTV)
            state, start = output.state, start + length
    assert_near(torch.cat(pieces, 1), whole_BTV, 1e-6, "logits")
