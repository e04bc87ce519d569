"""Hyper-connections: the paper's equations in loops in float64, the plain model at first, decoding, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.launch.plan.activations import Storage, made_bytes
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.model.config.checks import check_model
from amfm.model.config.schema import ModelConfig
from amfm.model.config.streams import HyperConnectionsConfig
from amfm.model.flops import flops_per_token
from amfm.model.hybrid import HybridModel
from amfm.model.matrices import is_matrix
from amfm.model.shapes import weight_shapes
from amfm.model.streams.hyper_connections import read_streams, sinkhorn, write_streams
from tests.helpers.numbers import assert_near
from tests.model.small_models import meta_of, packed_batch, small_config
from tests.model.streams.trained import trained_model

PATTERN = "M*E-M-*"
FLOAT64 = 1e-11  # of sums in another order


def config_of(streams: int, pattern: str = PATTERN, rounds: int = 20, **changes: Any) -> ModelConfig:
    return small_config(pattern, hyper_connections={"streams": streams, "sinkhorn_iterations": rounds}, **changes)


def doubly_stochastic(logits: list[list[Tensor]], rounds: int) -> list[list[Tensor]]:
    """Equation 9 of the paper: columns, then rows, divided by their sums."""
    found, every = [[value.exp() for value in row] for row in logits], range(len(logits))
    for _ in range(rounds):
        columns = [sum(found[i][j] for i in every) for j in every]
        found = [[found[i][j] / columns[j] for j in every] for i in every]
        found = [[value / sum(row) for value in row] for row in found]
    return found


def reference_logits(model: HybridModel, tokens_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """Equations 1 and 7 to 9, stream by stream."""
    config, section = model.config, model.config.hyper_connections
    assert section is not None and model.embedding is not None and model.final_norm is not None
    number, every = section.streams, range(section.streams)
    streams = [model.embedding(tokens_BT) * config.multipliers.embedding for _ in every]
    for block in model.blocks:
        weight, scale, bias = (block.stream.maps.get_parameter(name) for name in ("weight", "scale", "bias"))
        joined_BTX = torch.cat(streams, dim=-1)
        normed_BTX = joined_BTX / (joined_BTX.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
        h = [
            scale[min(row // number, 2)] * (normed_BTX * weight[row]).sum(-1) + bias[row]
            for row in range(number * (number + 2))
        ]
        read_BTD = sum(torch.sigmoid(h[i])[..., None] * streams[i] for i in every)
        normed_BTD = read_BTD if block.norm_after else block.norm(read_BTD)
        y_BTD = block.mixer(normed_BTD, meta_of(ids_BT), None).y_BTD
        last = block.norm if block.norm_after else block.out_norm
        y_BTD = (y_BTD if last is None else last(y_BTD)) * config.multipliers.residual
        rows = [h[2 * number + i * number : 2 * number + (i + 1) * number] for i in every]
        mix = doubly_stochastic(rows, section.sinkhorn_iterations)
        streams = [
            sum(mix[i][j][..., None] * streams[j] for j in every) + 2 * torch.sigmoid(h[number + i])[..., None] * y_BTD
            for i in every
        ]
    return model.final_norm(sum(streams) / number) @ model.head_weight().T


@pytest.mark.parametrize(
    ("streams", "rounds", "changes"),
    [(4, 20, {}), (2, 1, {"norm_placement": "after"}), (3, 5, {"norm_placement": "both"})],
)
def test_logits_and_gradients_are_those_of_the_equations(streams: int, rounds: int, changes: dict[str, Any]) -> None:
    multipliers = {"embedding": 2.0, "residual": 0.7}
    model = trained_model(config_of(streams, rounds=rounds, multipliers=multipliers, **changes)).eval()
    tokens_BT, _, ids_BT = packed_batch(((7, 1, 55),))
    logits_BTV = model(tokens_BT, meta_of(ids_BT)).logits_BTV
    pull_BTV = torch.randn(logits_BTV.shape, dtype=torch.float64)
    expected_BTV = reference_logits(model, tokens_BT, ids_BT)
    assert_near(logits_BTV, expected_BTV, FLOAT64)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad((logits_BTV * pull_BTV).sum(), list(parameters.values()))
    expected = torch.autograd.grad((expected_BTV * pull_BTV).sum(), list(parameters.values()))
    for name, gradient, other in zip(parameters, found, expected, strict=True):
        assert_near(gradient, other, FLOAT64, name)


def test_any_logits_give_a_doubly_stochastic_matrix() -> None:
    generator = torch.Generator().manual_seed(2)
    logits_BNN = torch.randn((50, 4, 4), generator=generator, dtype=torch.float64)
    mix_BNN = sinkhorn(logits_BNN, 20)
    assert_near(mix_BNN.sum(-1), torch.ones(50, 4, dtype=torch.float64), 1e-14)
    assert_near(mix_BNN.sum(-2), torch.ones(50, 4, dtype=torch.float64), 1e-3)  # what 20 rounds leave
    assert bool((mix_BNN > 0).all())
    far_BNN = (1e4 * logits_BNN).float().requires_grad_()
    mix_BNN = sinkhorn(far_BNN, 20)
    (mix_BNN * logits_BNN).sum().backward()
    assert bool(torch.isfinite(mix_BNN).all()) and bool(torch.isfinite(far_BNN.grad).all())


def test_in_bf16_streams_are_those_of_float32_rounded_once() -> None:
    generator = torch.Generator().manual_seed(1)
    streams_BTND, y_BTD = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 5, 3, 12), (1, 5, 12)))
    weights_BTX = torch.rand((1, 5, 15), generator=generator)
    wide = (streams_BTND.double(), weights_BTX.double())
    for found, expected in (
        (read_streams(streams_BTND, weights_BTX), read_streams(*wide)),
        (write_streams(streams_BTND, weights_BTX, y_BTD), write_streams(*wide, y_BTD.double())),
    ):
        assert found.dtype == torch.bfloat16
        assert_near(found.double(), expected, 2**-8)


def test_flops_are_those_of_the_maps_and_the_mixture() -> None:
    config = config_of(3, "M*E-/*", tie_embeddings=True)
    # A matrix [3 + 3 + 9, 3 D], read 3 D, mix 9 D and write 3 D products, each twice, and twice more backward.
    assert flops_per_token(config, 8)["residual_stream"] == 4 * 3 * 2 * (15 * 3 * 12 + 15 * 12)
    # A map to numbers, not of the stream to the stream: not one that Muon steps.
    name = "blocks.0.stream.maps.weight"
    assert not is_matrix(name, weight_shapes(config)[name])


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"and model.hyper_connections are both set, and a model has one kind"):
        check_model(config_of(2, "M*", attention_residuals={"blocks_per_source": 1}))
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        config_of(1)


def test_a_plan_counts_what_a_stage_sends_and_blocks_keep() -> None:
    section = HyperConnectionsConfig(streams=4)
    assert [section.num_tensors(number) for number in range(3)] == [1, 4, 4]
    config = config_of(4, "-" * 16)
    stream = config.hidden_size * 4
    assert made_bytes(config, Storage(4, "torch"), 1, range(2, 7)) == 5 * 4 * stream
    assert made_bytes(config, Storage(4, "torch"), 1, range(3)) == (1 + 4 + 4) * stream
    mine, plain = (block_bytes(each, "-", Storage(4, "torch")) for each in (config, small_config("-" * 16)))
    # 24 weights and the block's output next to what is read; the streams themselves are counted above.
    assert mine.kept - plain.kept == pytest.approx(24 * 4 + stream, abs=stream)
    assert mine.working > plain.working
