"""First values: their distributions, and that they depend only on the seed and the name."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.init import fill_part, initial_values
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.parallel.shards import Shard, ShardSpec, parameter_shards
from tests.helpers.shards import unshard

WIDE = ModelConfig(
    pattern="M*E-",
    vocab_size=500,
    hidden_size=64,
    mamba=Mamba2Config(num_heads=256, head_dim=2, state_size=4, num_groups=2),
    attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=16, qk_norm=True),
    moe=MoeConfig(num_experts=4, top_k=2, expert_hidden_size=32, shared_expert_hidden_size=64, expert_bias=True),
    feed_forward=FeedForwardConfig(hidden_size=128),
)


def values(config, seed=0):
    return dict(HybridModel(config, single_rank_groups(), seed=seed).named_parameters())


def test_matrices_have_the_configured_deviation_and_output_projections_a_smaller_one():
    outputs = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down")
    for name, value in values(WIDE).items():
        if value.dim() < 2 or "conv" in name:
            continue
        expected = 0.02 / math.sqrt(4) if name.endswith(outputs) else 0.02
        assert value.std().item() == pytest.approx(expected, rel=0.1), name
        assert abs(value.mean().item()) < 4 * expected / math.sqrt(value.numel()), name


def test_without_depth_scaling_all_matrices_have_one_deviation():
    parameters = values(WIDE.model_copy(update={"depth_scaled_init": False}))
    assert parameters["blocks.1.mixer.o_proj.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_a_latent_expert_scales_only_its_last_matrix():
    moe = WIDE.moe.model_copy(update={"latent_size": 48})
    parameters = values(WIDE.model_copy(update={"moe": moe}))
    assert parameters["blocks.2.mixer.experts.down"].std().item() == pytest.approx(0.02, rel=0.1)
    assert parameters["blocks.2.mixer.latent_up.weight"].std().item() == pytest.approx(0.01, rel=0.1)


def test_megatron_scales_both_last_matrices_of_latent_experts_and_draws_biases_of_convolutions():
    moe = WIDE.moe.model_copy(update={"latent_size": 48})
    parameters = values(WIDE.model_copy(update={"moe": moe, "megatron_init": True}))
    for name in ("experts.down", "latent_up.weight"):
        assert parameters[f"blocks.2.mixer.{name}"].std().item() == pytest.approx(0.01, rel=0.1)
    bias = parameters["blocks.0.mixer.conv.bias"]
    assert bias.abs().max() <= 0.5 and bias.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.15)
    same = values(WIDE)
    assert torch.equal(parameters["blocks.0.mixer.in_proj.weight"], same["blocks.0.mixer.in_proj.weight"])


def test_decay_and_time_step_start_in_their_ranges():
    parameters = values(WIDE)
    decay_H = parameters["blocks.0.mixer.A_log"].exp()
    assert 1 <= decay_H.min() < 2 and 15 < decay_H.max() <= 16
    assert decay_H.mean().item() == pytest.approx(8.5, rel=0.1)
    step_H = torch.nn.functional.softplus(parameters["blocks.0.mixer.dt_bias"])
    assert 1e-3 * 0.999 <= step_H.min() < 2e-3 and 5e-2 < step_H.max() <= 0.1 * 1.001
    assert step_H.log10().mean().item() == pytest.approx(-2.0, abs=0.15)


def test_norms_and_skips_start_at_one_and_biases_at_zero():
    parameters = values(WIDE)
    ones = ("norm.weight", ".D")
    assert all((value == 1).all() for name, value in parameters.items() if name.endswith(ones))
    assert (parameters["blocks.0.mixer.conv.bias"] == 0).all()


def test_first_values_depend_on_seed_and_name_alone():
    here, again, other = values(WIDE), values(WIDE), values(WIDE, seed=1)
    longer = values(WIDE.model_copy(update={"pattern": "M*E-MM", "depth_scaled_init": False}))
    flat = values(WIDE.model_copy(update={"depth_scaled_init": False}))
    for name, value in here.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(flat[name], longer[name]), name
        if not name.endswith(("norm.weight", ".D", "conv.bias")):
            assert not torch.equal(value, other[name]), name
    assert not torch.equal(here["blocks.1.mixer.k_proj.weight"], here["blocks.1.mixer.v_proj.weight"])
    experts = here["blocks.2.mixer.experts.up"]
    assert not torch.equal(experts[0], experts[1])


class RankOf:
    """A group of `size` ranks as `rank` of it sees it, without communication."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def filled_part(name, shape, shard, rank, ranks):
    groups = single_rank_groups()
    groups.tp = RankOf(rank, ranks)
    part = torch.empty_like(shard.shard(torch.empty(shape), groups))
    fill_part(part, name, shard, shape, WIDE, groups, seed=3)
    return part


@pytest.mark.parametrize("ranks", [2, 4])
def test_matrices_of_many_pieces_are_the_same_on_any_ranks_that_share_them(monkeypatch, ranks):
    monkeypatch.setattr(
        "amfm.model.init.PIECE_VALUES", 700
    )  # ten rows of the residual stream or so, and no divisor of any shard
    whole = HybridModel(WIDE, single_rank_groups(), seed=3)
    for name, parameter, shard in parameter_shards(whole):
        if shard.per_expert or name.endswith(("A_log", "dt_bias")):
            continue  # drawn expert by expert; drawn whole by the mixer
        parts = [filled_part(name, parameter.shape, shard, rank, ranks) for rank in range(ranks)]
        joined = unshard(shard.cuts[0], parts) if shard.cuts else parts[0]
        assert torch.equal(joined, parameter), name
    embedding = WIDE.vocab_size, WIDE.hidden_size
    assert torch.equal(initial_values("embedding.weight", embedding, WIDE, 3), whole.embedding.weight)


def test_pieces_of_a_matrix_differ_and_have_its_deviation(monkeypatch):
    monkeypatch.setattr("amfm.model.init.PIECE_VALUES", 64 * 50)
    pieces = values(WIDE)["embedding.weight"].split(50)
    assert len({piece.sum().item() for piece in pieces}) == 10
    assert all(piece.std().item() == pytest.approx(0.02, rel=0.1) for piece in pieces)


class NormalDraws(TorchDispatchMode):
    """Records the shape of every tensor that is filled with normal numbers."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.normal_.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_a_rank_draws_only_the_pieces_that_it_holds(monkeypatch):
    monkeypatch.setattr("amfm.model.init.PIECE_VALUES", 64 * 50)
    shard = Shard((ShardSpec(0, "tp", (404,)),))
    with NormalDraws() as draws:
        filled_part("embedding.weight", (404, 64), shard, rank=3, ranks=4)
    # Rows 303 to 404 are in the last three pieces of 50, the last of them of 4 rows.
    assert draws.shapes == [(50, 64), (50, 64), (4, 64)]
