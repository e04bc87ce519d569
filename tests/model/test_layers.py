"""Layers on Megatron's: their cuts, their buffers, and that they cost nothing on one rank."""

import pytest
import torch
from torch import nn

from model.groups import single_rank_groups
from model.layers import ColumnLinear, KeepsBuffers, RowLinear, Shard, VocabEmbedding, divide
from tests.model.small_models import small_config, small_model


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


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_cut_tensor_join_to_the_whole(size):
    whole = torch.arange(12.0 * 5).view(12, 5)
    shard = Shard(0, (6, 3, 3))
    parts = [shard.take(whole, rank, size) for rank in range(size) if 3 % size == 0]
    if parts:
        assert torch.equal(shard.join(parts), whole)
    columns = Shard(1, (6, 6))
    parts = [columns.take(whole.repeat(1, 3)[:, :12], rank, size) for rank in range(size)]
    assert torch.equal(columns.join(parts), whole.repeat(1, 3)[:, :12])


def test_each_rank_gets_its_slice_of_every_segment():
    whole = torch.tensor([0, 1, 2, 3, 10, 11])
    assert Shard(0, (4, 2)).take(whole, 1, 2).tolist() == [2, 3, 11]
    assert torch.equal(Shard().take(whole, 1, 2), whole)


def test_a_size_that_ranks_do_not_divide_is_refused():
    groups = single_rank_groups()
    groups.tp.size = lambda: 3
    with pytest.raises(ValueError, match=r"parallel.tensor=3 must divide model.x=8"):
        divide(8, groups, "model.x")


def test_buffers_keep_float32_and_their_exact_values_under_casts():
    class Holder(KeepsBuffers):
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
