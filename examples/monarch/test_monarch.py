"""Monarch's transforms are Fourier's, the block is its formula in each document, and decoding continues token by
token.
"""

from __future__ import annotations

import importlib
import math
import tomllib
from pathlib import Path

import pytest
import torch
from amfm_monarch.mixer import MonarchMixer
from amfm_monarch.spec import SPEC, MonarchOptions
from amfm_monarch.transform import convolve, from_spectrum, to_spectrum
from torch import Tensor

from amfm.model.config.schema import RegisteredMixers
from amfm.model.mixers.interface import BuildContext
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from tests.helpers.examples import assert_a_cut_changes_nothing, install_example, write_probe
from tests.helpers.text.losses import OTHERS, UNITS, losses_on_plays

D, LONGEST = 6, 40


@pytest.fixture
def mixer() -> MonarchMixer:
    build = BuildContext(D, 1e-5, 0, 1, single_rank_groups(), "torch", RegisteredMixers())
    made = MonarchMixer(MonarchOptions(max_tokens=LONGEST, filter_size=5, bands=3), build).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("tokens", [1, 2, 7, 63, 64])
def test_two_block_diagonal_products_are_a_fourier_transform(tokens: int) -> None:
    x, kernel = torch.randn(3, tokens, dtype=torch.float64), torch.randn(3, tokens + 2, dtype=torch.float64)
    m = math.isqrt(2 * tokens - 2) + 1
    found = to_spectrum(x, m)
    torch.testing.assert_close(found.transpose(-1, -2).flatten(1), torch.fft.fft(x, m * m), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(from_spectrum(found)[:, :tokens], x, rtol=1e-12, atol=1e-12)
    expected = torch.stack([sum(kernel[:, t - j] * x[:, j] for j in range(t + 1)) for t in range(tokens)], -1)
    torch.testing.assert_close(convolve(x[None], kernel)[0], expected, rtol=1e-11, atol=1e-11)


def reference(mixer: MonarchMixer, u_TD: Tensor) -> Tensor:
    """One document, every pair of tokens."""
    wide = u_TD @ mixer.in_proj.weight.T
    taps = mixer.conv.weight
    short = torch.stack([sum(taps[:, 2 - i] * wide[t - i] for i in range(3) if t >= i) for t in range(len(u_TD))])
    a, b, v = short.chunk(3, -1)
    kernels, rows = [], []
    for t in range(len(u_TD)):
        place = t / LONGEST
        turns = [2 * math.pi * f * place for f in (1, 2, 3)]
        features = torch.tensor([place, *map(math.sin, turns), *map(math.cos, turns)], dtype=torch.float64)
        inner = (mixer.place_inner @ (mixer.place_in @ features).sin()).sin()
        reach = 0.3 + 1.2 * torch.arange(D, dtype=torch.float64) / (D - 1)
        kernels.append((mixer.kernels @ inner) * (math.log(0.01) * place / reach).exp())
    for t in range(len(u_TD)):
        long = sum(kernels[t - j][0] * a[j] * v[j] for j in range(t + 1))
        rows.append(b[t] * long + sum(kernels[t - j][1] * u_TD[j] for j in range(t + 1)))
    return torch.stack(rows) @ mixer.out_proj.weight.T


def test_it_is_its_formula_in_each_document_with_gradients(mixer: MonarchMixer) -> None:
    x_BTD = torch.randn(2, 23, D, dtype=torch.float64, requires_grad=True)
    meta = PackMeta.from_document_ids(torch.tensor([[0] * 7 + [1] + [2] * 15, [0] * 23]))
    found = mixer(x_BTD, meta).y_BTD
    first = torch.cat([reference(mixer, piece) for piece in x_BTD[0].split([7, 1, 15])])
    expected = torch.stack([first, reference(mixer, x_BTD[1])])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    leaves = [x_BTD, *mixer.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for actual, right in zip(torch.autograd.grad(found.square().sum(), leaves), wanted):
        torch.testing.assert_close(actual, right, rtol=1e-7, atol=1e-6)


def test_a_text_in_pieces_is_the_whole_text_up_to_the_longest(mixer: MonarchMixer) -> None:
    x_BTD = torch.randn(2, LONGEST, D, dtype=torch.float64)
    whole = mixer(x_BTD, PackMeta.one_document_a_row(2, LONGEST)).y_BTD
    state, pieces = mixer.empty_state(2), []
    for start, end in ((0, 9), (9, 10), (10, 11), (11, LONGEST)):
        output = mixer(x_BTD[:, start:end], PackMeta.one_document_a_row(2, end - start, start=start), state)
        state = output.state
        pieces.append(output.y_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"max_tokens=40 must be at least the 41 tokens of a document"):
        mixer(x_BTD[:, :1], PackMeta.one_document_a_row(2, 1, start=LONGEST), state)
    with pytest.raises(ValueError, match="41 tokens"):
        mixer(torch.zeros(1, 41, D, dtype=torch.float64), PackMeta.one_document_a_row(1, 41))


def test_its_entry_point_names_the_spec_and_what_it_refuses() -> None:
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["amfm.mixers"]["monarch"].partition(":")
    assert getattr(importlib.import_module(module), name) is SPEC and SPEC.load() is MonarchMixer
    assert set(SPEC.refuses) == {"context"}
    broken = dict(MonarchOptions(max_tokens=8, bands=5).broken_widths(4))
    assert set(broken) == {"bands"}


RECALL = {"task": "mqar", "num_pairs": 4, "num_keys": 16, "num_values": 16}
MODEL = {
    "pattern": "{monarch}{monarch}",
    "vocab_size": 33,
    "hidden_size": 64,
    "mixers": {"monarch": {"max_tokens": 24, "filter_size": 32}},
}


@pytest.mark.slow
def test_a_run_that_is_cut_goes_on_as_if_it_were_not(tmp_path: Path) -> None:
    packages = install_example("monarch", tmp_path / "packages")
    config = write_probe(tmp_path, RECALL, MODEL, steps=4, sequence_length=24)
    assert_a_cut_changes_nothing(config, tmp_path, packages, stop=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_on_text_its_convolutions_are_ahead_of_attention_in_few_steps(tmp_path: Path, seed: int) -> None:
    mixers = {"monarch": {"max_tokens": 64}}
    own = {"pattern": "({monarch}-)x2", "mixers": mixers, "feed_forward": UNITS | {"hidden_size": 352}}
    packages = install_example("monarch", tmp_path / "packages")
    found = losses_on_plays(packages, tmp_path / "plays", seed, 120, {"monarch": own} | OTHERS)
    loss = {name: each["loss"] for name, each in found.items()}
    assert loss["monarch"] < loss["attention"] - 0.1 < loss["without tokens before"] - 0.3
