"""LSSL is its recurrence in each document, HiPPO remembers what one decay does not, and a run with it can be cut."""

from __future__ import annotations

import importlib
import math
import tomllib
from pathlib import Path

import pytest
import torch
from amfm_s4d.lssl import LsslMixer
from amfm_s4d.lssl_spec import SPEC, LsslOptions
from amfm_s4d.mixer import S4DMixer
from amfm_s4d.spec import S4DOptions
from torch import Tensor
from torch.nn.functional import gelu

from amfm.model.config.schema import RegisteredMixers
from amfm.model.mixers.interface import BuildContext
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from tests.helpers.examples import assert_a_cut_changes_nothing, install_example, write_probe

H, N, V, D = 3, 6, 4, 10
BUILD = BuildContext(D, 1e-5, 0, 1, single_rank_groups(), "torch", RegisteredMixers())


def draw(mixer: LsslMixer | S4DMixer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            own = mixer.init_parameter(name, tuple(parameter.shape), generator)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) if own is None else own)


@pytest.fixture
def mixer() -> LsslMixer:
    made = LsslMixer(LsslOptions(num_heads=H, head_dim=N, value_head_dim=V, chunk_size=8), BUILD).double()
    draw(made)
    return made


def reference(mixer: LsslMixer, x_TD: Tensor) -> Tensor:
    """One document, a token after the other, with the matrix inverted as it stands."""
    u_THV = (x_TD @ mixer.in_proj.weight.T).unflatten(-1, (H, V))
    rows = []
    for head in range(H):
        root = (2 * torch.arange(N) + 1).double().sqrt()
        # HiPPO-LegS, from its definition; gradients pass through what is learned of it.
        hippo = -(root[:, None] * root).tril(-1) - torch.diag(torch.arange(1.0, N + 1).double())
        A = mixer.below[head].tril(-1) - torch.diag(mixer.log_rates[head].exp())
        torch.testing.assert_close(A, hippo, rtol=1e-6, atol=1e-6)
        dt, one = mixer.log_dt[head].exp(), torch.eye(N, dtype=torch.float64)
        inverse = torch.linalg.inv(one - dt / 2 * A)
        state, outputs = torch.zeros(N, V, dtype=torch.float64), []
        for u in u_THV[:, head]:
            state = inverse @ (one + dt / 2 * A) @ state + torch.outer(inverse @ (dt * mixer.inputs[head]), u)
            outputs.append((mixer.C[head] * state.T).sum(1) + mixer.skip[head] * u)
        rows.append(torch.stack(outputs))
    return gelu(torch.stack(rows, 1).flatten(1)) @ mixer.out_proj.weight.T


def test_it_is_its_recurrence_in_each_document_with_gradients(mixer: LsslMixer) -> None:
    x_BTD = torch.randn(1, 27, D, dtype=torch.float64, requires_grad=True)
    found = mixer(x_BTD, PackMeta.from_document_ids(torch.tensor([[0] * 6 + [1] + [2] * 20]))).y_BTD
    expected = torch.cat([reference(mixer, piece) for piece in x_BTD[0].split([6, 1, 20])])[None]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    leaves = [x_BTD, *mixer.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for actual, right in zip(torch.autograd.grad(found.square().sum(), leaves), wanted):
        torch.testing.assert_close(actual, right, rtol=1e-7, atol=1e-8)


def test_decoding_goes_on_from_its_state(mixer: LsslMixer) -> None:
    x_BTD = torch.randn(2, 17, D, dtype=torch.float64)
    whole = mixer(x_BTD, PackMeta.one_document_a_row(2, 17)).y_BTD
    state, pieces = mixer.empty_state(2), []
    for start, end in ((0, 9), (9, 10), (10, 17)):
        output = mixer(x_BTD[:, start:end], PackMeta.one_document_a_row(2, end - start, start=start), state)
        state = output.state
        pieces.append(output.y_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


def unreadable_history(kernels_NT: Tensor, signal_RT: Tensor, generator: torch.Generator) -> float:
    """The share of signals that the best linear read of the state after their last token misses; the state is known to 1e-3."""
    states = signal_RT @ kernels_NT.flip(1).T
    states = states / states.std(0)
    states = states + 1e-3 * torch.randn(states.shape, generator=generator, dtype=torch.float64)
    fitted = states @ torch.linalg.lstsq(states, signal_RT).solution
    return float((signal_RT - fitted).square().sum() / signal_RT.square().sum())


@torch.no_grad()
def lost_by(seed: int, tokens_of_unit: int) -> tuple[float, float, float]:
    """What LegS, the same diagonal with random numbers below it, and S4D lose of 200 tokens, at a time step of 1 / tokens."""
    states, tokens = 16, 200
    lssl = LsslMixer(LsslOptions(num_heads=1, head_dim=states, value_head_dim=1), BUILD).double()
    s4d = S4DMixer(S4DOptions(num_heads=1, head_dim=states, value_head_dim=1), BUILD).double()
    for mixer in (lssl, s4d):
        draw(mixer)
        mixer.log_dt.fill_(-math.log(tokens_of_unit))
    generator = torch.Generator().manual_seed(seed)

    def kernels_of() -> Tensor:
        matrix, written = lssl.discretize()
        rows = [written[0]]
        for _ in range(tokens - 1):
            rows.append(matrix[0] @ rows[-1])
        return torch.stack(rows, 1)

    legs = kernels_of()
    lssl.below.copy_(torch.randn(lssl.below.shape, generator=generator, dtype=torch.float64))
    lssl.inputs.copy_(torch.randn(lssl.inputs.shape, generator=generator, dtype=torch.float64))
    log_decay, angle, _ = s4d.kernel_terms()
    place = torch.arange(tokens, dtype=torch.float64)
    turns = angle[0][:, None] * place
    waves = torch.cat([turns.cos(), turns[1:].sin()]) * (log_decay * place).exp()
    smooth = torch.stack([(torch.pi * k * place / tokens).cos() / (1 + k) for k in range(60)])
    signals = torch.randn(3000, 60, generator=generator, dtype=torch.float64) @ smooth
    lost = [unreadable_history(kernels, signals, generator) for kernels in (legs, kernels_of(), waves)]
    return lost[0], lost[1], lost[2]


@pytest.mark.parametrize("seed", [0, 1])
def test_hippo_holds_the_past_at_every_time_step_where_other_states_do_at_one(seed: int) -> None:
    found = {unit: lost_by(seed, unit) for unit in (200, 100, 50)}
    for unit, (legs, random, s4d) in found.items():
        print(f"seed {seed}, step 1/{unit}: LegS loses {legs:.4f}, random {random:.4f}, S4D {s4d:.4f}")
        assert legs < 0.035 and legs < 0.5 * random
    assert found[50][2] > 3 * found[50][0], "one decay forgets what is more than its time ago"


def test_its_entry_point_names_the_spec_and_a_fixed_state_is_not_trained() -> None:
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["amfm.mixers"]["lssl"].partition(":")
    assert getattr(importlib.import_module(module), name) is SPEC and SPEC.load() is LsslMixer
    fixed = LsslMixer(LsslOptions(num_heads=2, trains_state=False), BUILD)
    trained = {name for name, parameter in fixed.named_parameters() if parameter.requires_grad}
    assert trained == {"in_proj.weight", "out_proj.weight", "C", "skip"}
    assert set(dict(LsslOptions(num_heads=2, conv_kernel=3).broken_rules())) == {"conv_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False])
def test_a_run_that_is_cut_goes_on_as_if_it_were_not(tmp_path: Path, trains: bool) -> None:
    packages = install_example("s4d", tmp_path / "packages")
    section = {"num_heads": 4, "head_dim": 8, "value_head_dim": 8, "trains_state": trains}
    model = {"pattern": "{lssl}-", "vocab_size": 33, "feed_forward": {"hidden_size": 64}, "mixers": {"lssl": section}}
    task = {"task": "mqar", "num_pairs": 4, "num_keys": 16, "num_values": 16}
    config = write_probe(tmp_path, task, model, steps=4, sequence_length=24)
    assert_a_cut_changes_nothing(config, tmp_path, packages, stop=2)
