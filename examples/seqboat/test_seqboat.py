"""SeqBoat is its formula token by token, keeps documents apart, bounds its work, and decodes with a state of fixed size."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import torch
from amfm_seqboat.mixer import SeqBoatMixer
from amfm_seqboat.spec import SPEC, SeqBoatOptions
from torch import Tensor

from amfm.model.config.schema import RegisteredMixers
from amfm.model.mixers.interface import BuildContext
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups

H, K, WINDOW, D = 2, 4, 3, 10


def make_mixer(capacity: float = 1.0) -> SeqBoatMixer:
    build = BuildContext(D, 1e-5, 0, 1, single_rank_groups(), "torch", RegisteredMixers())
    options = SeqBoatOptions(num_heads=H, head_dim=K, window=WINDOW, capacity=capacity, chunk_size=4)
    made = SeqBoatMixer(options, build).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            own = made.init_parameter(name, tuple(parameter.shape), generator)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) if own is None else own)
    return made


def reference(mixer: SeqBoatMixer, x_TD: Tensor, most: int = 1000) -> tuple[Tensor, list[int]]:
    """One document, a token after the other; the active tokens besides. At most so many are active."""
    rates, gain = mixer.log_rates.exp(), mixer.shares
    average, q, k, v, rows, active = torch.zeros_like(rates), {}, {}, {}, [], []
    for t, x in enumerate(x_TD):
        average = (-rates).exp() * average + (1 - (-rates).exp()) * x[:, None]
        h = (gain * average).sum(-1)
        p = (mixer.router.weight @ h / mixer.temperature).softmax(0)[1]
        if p > 0.5 and len(active) < most:
            active.append(t)
            q[t], k[t], v[t] = (mixer.in_proj.weight @ h).view(3, H, K)
            seen = active[-WINDOW:]
            heads = [
                (torch.stack([q[t][i] @ k[j][i] for j in seen]) / K**0.5).softmax(0)
                @ torch.stack([v[j][i] for j in seen])
                for i in range(H)
            ]
            h = h + p * (mixer.out_proj.weight @ torch.cat(heads))
        rows.append(h)
    return torch.stack(rows), active


def test_it_is_its_formula_in_each_document_with_gradients() -> None:
    mixer = make_mixer()
    x_BTD = torch.randn(1, 24, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = mixer(x_BTD, PackMeta.from_document_ids(torch.tensor([[0] * 7 + [1] * 17]))).y_BTD
    (first, _), (second, active) = reference(mixer, x_BTD[0, :7]), reference(mixer, x_BTD[0, 7:])
    assert WINDOW < len(active) < 17, "some tokens are active, more than a window"
    expected = torch.cat([first, second])[None]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    leaves = [x_BTD, *mixer.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for actual, right in zip(torch.autograd.grad(found.square().sum(), leaves), wanted):
        torch.testing.assert_close(actual, right, rtol=1e-8, atol=1e-8)


def test_beyond_the_capacity_the_latest_tokens_stay_without_attention() -> None:
    mixer = make_mixer(capacity=0.25)
    x_BTD = torch.randn(1, 16, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert len(reference(mixer, x_BTD[0])[1]) > 4
    expected, active = reference(mixer, x_BTD[0], most=4)
    assert len(active) == 4
    found = mixer(x_BTD, PackMeta.one_document_a_row(1, 16)).y_BTD[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_decoding_goes_on_from_a_state_of_fixed_size_in_each_row() -> None:
    mixer = make_mixer()
    x_BTD = torch.randn(3, 14, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = mixer(x_BTD, PackMeta.one_document_a_row(3, 14)).y_BTD
    state, pieces = mixer.empty_state(3), []
    sizes = {name: tensor.shape for name, tensor in state.items()}
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 14)):
        output = mixer(x_BTD[:, start:end], PackMeta.one_document_a_row(3, end - start, start=start), state)
        state = output.state
        pieces.append(output.y_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    assert {name: tensor.shape for name, tensor in state.items()} == sizes
    assert len(set(state["count"].tolist())) > 1, "rows differ in how many tokens were active"


def test_its_entry_point_names_the_spec_and_what_it_refuses() -> None:
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["amfm.mixers"]["seqboat"].partition(":")
    assert getattr(importlib.import_module(module), name) is SPEC and SPEC.load() is SeqBoatMixer
    assert set(SPEC.refuses) == {"context", "tensor"}
