"""The Fourier head is the published density and penalty, smooths what little data says, and serves a whole run."""

from __future__ import annotations

import importlib
import json
import math
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from amfm_fourier_head.head import FLOOR, FourierHead, roughness
from amfm_fourier_head.spec import SPEC, FourierHeadOptions
from torch import Tensor, nn

from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.schema import ModelConfig
from tests.helpers.examples import amfm, assert_a_cut_changes_nothing, install_example, metrics_of, must, write_probe

BINS, N = 24, 5


def make_head(
    hidden: int, bins: int = BINS, frequencies: int = N, smoothness: float = 0.0, seed: int = 0
) -> FourierHead:
    attention = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=4)
    config = ModelConfig(pattern="*", vocab_size=bins, hidden_size=hidden, attention=attention)
    head = FourierHead(FourierHeadOptions(num_frequencies=frequencies, smoothness=smoothness), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(head.init_parameter(name, tuple(parameter.shape), generator))
    return head


def correlations(a: Tensor) -> list[Tensor]:
    size = a.shape[-1]
    return [(a[..., : size - k].conj() * a[..., k:]).sum(-1) for k in range(size)]


def reference(head: FourierHead, hidden_RD: Tensor) -> Tensor:
    """The density from autocorrelations, a bin after the other."""
    c = correlations(torch.complex(*(hidden_RD @ head.weight.T + head.bias).chunk(2, dim=-1)))
    columns = []
    for z in ((2 * b + 1) / BINS - 1 for b in range(BINS)):
        wave = sum(
            (c[k] / c[0] * complex(math.cos(math.pi * k * z), math.sin(math.pi * k * z))).real for k in range(1, N + 1)
        )
        columns.append(0.5 + wave + FLOOR)
    density = torch.stack(columns, -1)
    return (density / density.sum(-1, keepdim=True)).log()


def test_it_is_the_published_density_with_gradients() -> None:
    head = make_head(7).double()
    hidden_RD = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    found, expected = head(hidden_RD[None]).log_p_BTV[0], reference(head, hidden_RD)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    leaves = [hidden_RD, head.weight, head.bias]
    labels = torch.tensor([[3, -100, 0, 23, 9]])
    loss = head(hidden_RD[None], labels).loss
    picked = -sum(expected[row, label] for row, label in enumerate(labels[0].tolist()) if label >= 0)
    torch.testing.assert_close(loss.total, picked, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.token_nll_R[1], torch.zeros(()))
    wanted = torch.autograd.grad(picked, leaves)
    for actual, right in zip(torch.autograd.grad(loss.total, leaves), wanted):
        torch.testing.assert_close(actual, right, rtol=1e-7, atol=1e-8)


def test_the_penalty_is_its_sum_over_autocorrelations_of_labelled_tokens_with_gradients() -> None:
    head = make_head(7, smoothness=0.3).double().train()
    hidden_RD = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[3, -100, 0, 23]])
    with_it, without = head(hidden_RD[None], labels), head.eval()(hidden_RD[None], labels)
    a = head.coefficients(hidden_RD)
    rough = sum(4 * math.pi**2 * k**2 * c.abs().square() for k, c in enumerate(correlations(a)))
    torch.testing.assert_close(roughness(a), rough, rtol=1e-10, atol=1e-10)
    expected, added = 0.3 * rough[[0, 2, 3]].sum(), with_it.loss.total - without.loss.total
    torch.testing.assert_close(added, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(with_it.auxiliary["smoothness"], expected.detach() / 3)
    leaves = [hidden_RD, head.weight, head.bias]
    for actual, right in zip(torch.autograd.grad(added, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(actual, right, rtol=1e-8, atol=1e-9)


def fit(kind: str, seed: int, smoothness: float = 0.0) -> tuple[float, float]:
    """Nats of new draws from a density of which 60 draws were seen, and the mean step from bin to bin of what was fitted."""
    bins, generator = 48, torch.Generator().manual_seed(seed)
    places = torch.arange(bins, dtype=torch.float32)
    shape = (
        torch.softmax(-0.5 * ((places - 15) / 4) ** 2, 0) * 0.7
        + torch.softmax(-0.5 * ((places - 34) / 3) ** 2, 0) * 0.3
    )
    seen = torch.multinomial(shape, 60, replacement=True, generator=generator)
    torch.manual_seed(seed)
    linear = nn.Sequential(nn.Linear(4, bins), nn.LogSoftmax(-1))
    fourier = make_head(4, bins, 12, smoothness, seed).train()
    hidden = torch.ones(1, 1, 4)
    optimizer = torch.optim.Adam((fourier if kind == "fourier" else linear).parameters(), lr=0.03)
    for _ in range(300):
        if kind == "fourier":
            loss = fourier(hidden.expand(1, 60, 4), seen[None]).loss.total / 60
        else:
            loss = -linear(hidden)[0, 0, seen].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        log_p = fourier(hidden).log_p_BTV[0, 0] if kind == "fourier" else linear(hidden)[0, 0]
    return float(-(shape * log_p).sum()), float(log_p.exp().diff().abs().mean())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_from_few_draws_it_finds_the_density_better_than_a_matrix_and_the_penalty_smooths_it(seed: int) -> None:
    (fourier, steps), (linear, linear_steps), (penalised, smooth_steps) = (
        fit("fourier", seed),
        fit("linear", seed),
        fit("fourier", seed, smoothness=1e-4),
    )
    print(
        f"seed {seed}: {fourier:.3f}, with penalty {penalised:.3f}, matrix {linear:.3f} nats; mean steps {steps:.4f}, {smooth_steps:.4f}, {linear_steps:.4f}"
    )
    assert fourier < linear - 0.1 and penalised < linear - 0.1
    assert smooth_steps < steps < linear_steps


TASK = {"task": "mqar", "num_pairs": 4, "num_keys": 16, "num_values": 16}
MODEL = {
    "pattern": "M*",
    "vocab_size": 33,
    "hidden_size": 32,
    "head": "fourier_head",
    "mamba": {"num_heads": 4, "head_dim": 8, "state_size": 4, "num_groups": 1, "chunk_size": 16},
    "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "positions": "rope"},
    "mixers": {"fourier_head": {"num_frequencies": 15, "smoothness": 1e-6}},
}


@pytest.mark.slow
def test_a_run_trains_resumes_evaluates_and_is_not_exported(tmp_path: Path) -> None:
    packages = install_example("fourier_head", tmp_path / "packages")
    config = write_probe(tmp_path, TASK, MODEL, steps=60, sequence_length=24)
    assert_a_cut_changes_nothing(config, tmp_path, packages, stop=20)
    lines = metrics_of(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3 and lines[-1]["auxiliary"]["smoothness"] > 0
    answer = json.loads(must("evaluate", tmp_path / "whole", "--synthetic", "mqar", "--json", packages=packages))
    assert 0 <= answer["accuracy"] <= 1
    refused = amfm("export", tmp_path / "whole", tmp_path / "export", packages=packages, cwd=tmp_path)
    assert refused.returncode != 0


def test_its_entry_point_names_the_spec_and_what_does_not_fit_is_refused() -> None:
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["amfm.mixers"]["fourier_head"].partition(":")
    assert getattr(importlib.import_module(module), name) is SPEC and SPEC.load() is FourierHead
    with pytest.raises(ValueError, match=r"num_frequencies=12 must be below half of model\.vocab_size=24"):
        make_head(4, frequencies=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tie_embeddings": True}, "model.tie_embeddings is of a head that is a matrix"),
        ({"pattern": "{fourier_head}*"}, "set model.head: fourier_head instead"),
        ({"mixers": {}}, "model.head=fourier_head reads model.mixers.fourier_head, which is missing"),
    ],
)
def test_wrong_settings_are_refused_in_words(tmp_path: Path, change: dict[str, object], words: str) -> None:
    packages = install_example("fourier_head", tmp_path / "packages")
    config = write_probe(tmp_path, TASK, MODEL, steps=2, sequence_length=24)
    tree = yaml.safe_load(config.read_text())
    tree["model"] |= change
    config.write_text(yaml.safe_dump(tree))
    refused = amfm("train", config, packages=packages, cwd=tmp_path)
    assert refused.returncode != 0 and words in refused.stdout + refused.stderr
