"""Layers on Megatron's: their cuts, their buffers, and that they cost nothing on one rank."""

import pytest
import torch
from torch import nn

from amfm.model.parallel.groups import single_rank_groups
from amfm.model.parallel.layers import ColumnLinear, Float32Buffers, RowLinear, VocabEmbedding
from amfm.model.parallel.regions import scatter_tokens
from amfm.model.parallel.shards import Shard, ShardSpec, divide, divide_units
from tests.helpers.shards import unshard
from tests.model.small_models import StandInGroup, small_config, small_model


def test_on_one_rank_layers_are_plain_products_and_look_ups():
    groups = single_rank_groups()
    column, row = ColumnLinear(5, (4, 3), groups, name="c"), RowLinear(7, 6, groups, name="r")
    table = VocabEmbedding(11, 5, groups)
    for layer in (column, row, table):
        nn.init.normal_(layer.weight)
    tokens = torch.tensor([[1, 10, 1]])
    expected = table.weight[tokens] @ column.weight.T @ row.weight.T
    y = row(column(table(tokens)))
    torch.testing.assert_close(y, expected)
    assert y.grad_fn.name() in ("UnsafeViewBackward0", "ViewBackward0", "MmBackward0", "ReshapeAliasBackward0")
    assert list(column.state_dict()) == ["weight"]
    ColumnLinear(5, (4, 3), groups, name="c").load_state_dict(column.state_dict(), strict=True)


def parts_of(cut, whole, size):
    return [cut.shard(whole, rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_parts_of_a_cut_tensor_join_to_the_whole(size):
    whole = torch.arange(12.0 * 18).view(18, 12)
    rows, columns = ShardSpec(0, "tp", (6, 12)), ShardSpec(1, "tp", (6, 6))
    for cut in (rows, columns):
        parts = parts_of(cut, whole, size)
        assert [part.shape[cut.dim] for part in parts] == [whole.shape[cut.dim] // size] * size
        assert torch.equal(unshard(cut, parts), whole)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_neighbouring_ranks_hold_copies_where_units_are_fewer(size):
    whole = torch.arange(8.0 * 3).view(8, 3).repeat(2, 1)
    cut = ShardSpec(0, "tp", (8, 4, 4), units=(8, 2, 4))
    parts = parts_of(cut, whole, size)
    assert torch.equal(unshard(cut, parts), whole)
    assert cut.slices(8) == (8, 2, 4) and cut.local_segments(8) == (1, 2, 1)
    if size == 8:
        assert torch.equal(parts[3][1:3], whole[8:10]) and torch.equal(parts[4][1:3], whole[10:12])


def test_units_that_ranks_cannot_share_are_a_bug():
    with pytest.raises(AssertionError, match="4 ranks cannot share 6 units"):
        ShardSpec(0, "tp", (12,), units=(6,)).slices(4)


def test_each_rank_gets_its_slice_of_every_segment():
    whole = torch.tensor([0, 1, 2, 3, 10, 11])
    assert ShardSpec(0, "tp", (4, 2)).shard(whole, 1, 2).tolist() == [2, 3, 11]
    assert torch.equal(Shard().shard(whole, single_rank_groups()), whole)


def test_a_parameter_is_cut_over_several_axes():
    groups = single_rank_groups()
    groups.ep = groups.expt_tp = StandInGroup(2, rank=1)
    whole = torch.arange(4 * 6 * 5).view(4, 6, 5)
    shard = Shard((ShardSpec(0, "ep", (4,)), ShardSpec(1, "expt_tp", (4, 2))))
    part = shard.shard(whole, groups)
    assert torch.equal(part, whole[2:, [2, 3, 5]])
    assert shard.per_expert and shard.whole_shape(part.shape) == (4, 6, 5)


def test_sizes_and_units_that_ranks_cannot_share_are_refused():
    groups = single_rank_groups()
    groups.tp = StandInGroup(3)
    with pytest.raises(ValueError, match=r"parallel.tensor=3 must divide model.x=8; use a divisor of 8"):
        divide(8, groups, "model.x")
    with pytest.raises(ValueError, match=r"parallel.tensor=3 must divide model.x=2 or be a multiple of it"):
        divide_units(2, groups, "model.x")


def test_tokens_that_tensor_ranks_cannot_share_are_refused():
    groups = single_rank_groups()
    groups.tp = StandInGroup(3)
    with pytest.raises(
        ValueError, match=r"sequences of 7 tokens .* by parallel.tensor=3 ranks .*; use a multiple of 3"
    ):
        scatter_tokens(torch.zeros(2, 7, 4), groups)


def test_buffers_keep_float32_and_their_exact_values_under_casts():
    class Holder(Float32Buffers):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("bias", torch.tensor([1.00001, 3.14159]))

    holder = Holder().bfloat16()
    assert holder.weight.dtype == torch.bfloat16 and holder.bias.dtype == torch.float32
    assert holder.bias.tolist() == torch.tensor([1.00001, 3.14159]).tolist()
    assert holder.double().bias.dtype == torch.float32
    assert holder.to("meta").bias.is_meta
    assert holder.to_empty(device="cpu").bias.dtype == torch.float32


def test_expert_bias_and_rotary_frequencies_stay_float32_in_a_bf16_model():
    model = small_model(small_config("*E"), dtype=torch.bfloat16)
    assert model.blocks[1].mixer.expert_bias.dtype == torch.float32
    assert model.blocks[0].mixer.inverse_frequencies.dtype == torch.float32
