"""S4D is the convolution that its formulas say, keeps documents apart, decodes with a state, and registers itself."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest
import torch
from amfm_s4d.mixer import S4DMixer
from amfm_s4d.spec import SPEC, S4DOptions

from amfm.model.config.schema import RegisteredMixers
from amfm.model.mixers.interface import BuildContext
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups

OPTIONS = S4DOptions(num_heads=3, head_dim=8, value_head_dim=4, chunk_size=8)


@pytest.fixture
def mixer() -> S4DMixer:
    build = BuildContext(10, 1e-5, 0, 1, single_rank_groups(), "torch", RegisteredMixers())
    made = S4DMixer(OPTIONS, build).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            own = made.init_parameter(name, tuple(parameter.shape), generator)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) if own is None else own)
    return made


def test_it_is_a_convolution_with_the_kernel_of_its_state_space(mixer: S4DMixer) -> None:
    x_BTD = torch.randn(2, 21, 10, dtype=torch.float64)
    u = (x_BTD @ mixer.in_proj.weight.T).unflatten(-1, (3, 4))
    dt, rate = mixer.log_dt.exp(), mixer.log_decay.exp()
    eigenvalue = torch.complex(-rate[:, None].expand(3, 4), (torch.pi * torch.arange(4).double()).expand(3, 4))
    step = (eigenvalue * dt[:, None]).exp()
    C = torch.complex(*mixer.C.chunk(2, dim=-1))
    # The recurrence itself, a token after the other.
    state, o = torch.zeros(2, 3, 4, 4, dtype=torch.complex128), []
    for t in range(21):
        state = step[:, None] * state + ((step - 1) / eigenvalue)[:, None] * u[:, t, ..., None]
        o.append(2 * (state * C[:, None]).sum(-1).real)
    y = torch.nn.functional.gelu((torch.stack(o, 1) + mixer.skip * u).flatten(-2)) @ mixer.out_proj.weight.T
    found = mixer(x_BTD, PackMeta.one_document_a_row(2, 21)).y_BTD
    torch.testing.assert_close(found, y, rtol=1e-10, atol=1e-10)


def test_documents_stay_apart_and_decoding_goes_on(mixer: S4DMixer) -> None:
    x_BTD = torch.randn(1, 17, 10, dtype=torch.float64)
    packed = PackMeta.from_document_ids(torch.tensor([[0] * 6 + [1] * 11]))
    found = mixer(x_BTD, packed).y_BTD
    second = mixer(x_BTD[:, 6:], PackMeta.one_document_a_row(1, 11)).y_BTD
    torch.testing.assert_close(found[:, 6:], second, rtol=1e-10, atol=1e-12)
    state, pieces = mixer.empty_state(1), []
    for start, end in ((6, 11), (11, 12), (12, 17)):
        meta = PackMeta.one_document_a_row(1, end - start, start=start - 6)
        output = mixer(x_BTD[:, start:end], meta, state)
        state = output.state
        pieces.append(output.y_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), second, rtol=1e-6, atol=1e-6)


def test_its_entry_point_names_the_spec_and_wrong_options_are_refused() -> None:
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["amfm.mixers"]["s4d"].partition(":")
    assert getattr(importlib.import_module(module), name) is SPEC and SPEC.load() is S4DMixer
    broken = dict(S4DOptions(num_heads=2, head_dim=7, conv_kernel=3).broken_rules())
    assert set(broken) == {"head_dim", "conv_kernel"}
