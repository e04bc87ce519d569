"""Attention over codes is the softmax that its formula says, all softmax where codes are the keys, and it can be trained."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest
import torch
from amfm_longvq.mixer import LongVqMixer
from amfm_longvq.spec import SPEC, LongVqOptions
from torch import Tensor
from torch.nn import functional

from amfm.model.config.schema import RegisteredMixers
from amfm.model.mixers.interface import BuildContext
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups

H, K, V = 3, 4, 5


def make_mixer(**options: object) -> LongVqMixer:
    build = BuildContext(10, 1e-5, 0, 1, single_rank_groups(), "torch", RegisteredMixers())
    section = LongVqOptions(num_heads=H, head_dim=K, value_head_dim=V, chunk_size=8, **options)
    made = LongVqMixer(section, build).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def reference(mixer: LongVqMixer, x_BTD: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The output with weights of all pairs [B, H, T, T], and the commitment; without a convolution."""
    q, k, v, gate = ((x_BTD @ w.T).unflatten(-1, (H, -1)) for w in mixer.in_proj.weight.split([12, 12, 15, 15]))
    q, k, codes = unit(q), unit(k), unit(mixer.codes)
    soft = torch.einsum("bjhk,hsk->bjhs", k, codes).div(K**0.5).softmax(-1)
    hard = functional.one_hot(soft.argmax(-1), codes.shape[1]).double()
    choice = hard + soft - soft.detach()
    pairs = torch.einsum("bjhs,bihs->bhij", choice, torch.einsum("bihk,hsk->bihs", q, codes).div(K**0.5).exp())
    seen = (ids_BT[:, :, None] == ids_BT[:, None]).tril()[:, None]
    weights = torch.where(seen, pairs, 0.0)
    o = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v).flatten(2)
    own = torch.einsum("bjhs,hsk->bjhk", hard, codes)
    commit = 0.1 * ((k - own.detach()).square().mean() + (k.detach() - own).square().mean())
    return (o * functional.silu(gate.flatten(2))) @ mixer.out_proj.weight.T, commit


def test_it_is_softmax_over_codes_of_each_document_with_gradients() -> None:
    mixer = make_mixer(num_codes=6, conv_kernel=0)
    x_BTD = torch.randn(2, 21, 10, dtype=torch.float64, requires_grad=True)
    ids_BT = torch.tensor([[0] * 6 + [1] * 15, [0] * 21])
    output = mixer(x_BTD, PackMeta.from_document_ids(ids_BT))
    expected, commit = reference(mixer, x_BTD, ids_BT)
    torch.testing.assert_close(output.y_BTD, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.auxiliary["commit"], commit, rtol=1e-10, atol=1e-12)
    leaves = [x_BTD, *mixer.parameters()]
    found = torch.autograd.grad(output.y_BTD.square().sum() + output.auxiliary["commit"], leaves)
    wanted = torch.autograd.grad(expected.square().sum() + commit, leaves)
    for actual, right in zip(found, wanted):
        torch.testing.assert_close(actual, right, rtol=1e-8, atol=1e-8)


def test_with_the_keys_as_codes_it_is_softmax_attention() -> None:
    mixer = make_mixer(num_codes=7, conv_kernel=0).eval()
    x_BTD = torch.randn(1, 7, 10, dtype=torch.float64)
    q, k, v, gate = ((x_BTD @ w.T).unflatten(-1, (H, -1)) for w in mixer.in_proj.weight.split([12, 12, 15, 15]))
    with torch.no_grad():
        mixer.codes.copy_(k[0].transpose(0, 1))
    heads = [x.transpose(1, 2) for x in (unit(q), unit(k), v)]
    o = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    expected = (o * functional.silu(gate.flatten(2))) @ mixer.out_proj.weight.T
    found = mixer(x_BTD, PackMeta.one_document_a_row(1, 7)).y_BTD
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_training_leaves_more_than_half_of_the_codes_in_use() -> None:
    mixer, teacher = make_mixer(num_codes=16, conv_kernel=0), make_mixer(num_codes=16, conv_kernel=0)
    x_BTD = torch.randn(2, 64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    meta = PackMeta.one_document_a_row(2, 64)
    with torch.no_grad():
        teacher.in_proj.weight.copy_(teacher.in_proj.weight.flip(0))
        wanted = teacher(x_BTD, meta).y_BTD
    optimizer, losses = torch.optim.Adam(mixer.parameters(), lr=2e-2), []
    for _ in range(40):
        output = mixer(x_BTD, meta)
        loss = (output.y_BTD - wanted).square().mean() + output.auxiliary["commit"]
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keys = unit((x_BTD @ mixer.in_proj.weight.split([12, 12, 15, 15])[1].T).unflatten(-1, (H, -1)))
    chosen = torch.einsum("bjhk,hsk->bjhs", keys, unit(mixer.codes)).argmax(-1)
    used = [len(chosen[:, :, head].unique()) for head in range(H)]
    assert losses[-1] < 0.8 * losses[0]
    assert min(used) > 8


def test_decoding_goes_on_from_a_state_of_fixed_size() -> None:
    mixer = make_mixer(num_codes=6, conv_kernel=3).eval()
    x_BTD = torch.randn(1, 11, 10, dtype=torch.float64)
    whole = mixer(x_BTD, PackMeta.one_document_a_row(1, 11)).y_BTD
    state, pieces = mixer.empty_state(1), []
    sizes = {name: tensor.shape for name, tensor in state.items()}
    for start, end in ((0, 5), (5, 6), (6, 11)):
        output = mixer(x_BTD[:, start:end], PackMeta.one_document_a_row(1, end - start, start=start), state)
        state = output.state
        pieces.append(output.y_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    assert {name: tensor.shape for name, tensor in state.items()} == sizes


def test_its_entry_point_names_the_spec_and_wrong_options_are_refused() -> None:
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["amfm.mixers"]["longvq"].partition(":")
    assert getattr(importlib.import_module(module), name) is SPEC and SPEC.load() is LongVqMixer
    with pytest.raises(ValueError, match="num_codes"):
        LongVqOptions(num_heads=2, num_codes=1)
