"""Compiled blocks compute what they compute without a compiler, in one graph a kind."""

import pytest
import torch
import torch._dynamo

from amfm.model.packing import PackMeta
from tests.model.small_models import MAMBA, MOE, loss_of, packed_batch, small_config, small_model

BATCHES = [((7, 1, 12, 3), (23,)), ((23,), (23,)), ((5, 18), (10, 13))]


def count_graph_breaks(pattern, dtype):
    mamba = MAMBA.model_copy(update={"chunk_size": 23})  # one chunk per row
    model = small_model(small_config(pattern, moe=MOE, mamba=mamba), dtype=dtype)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_blocks(compiler="eager")  # graphs are broken before a compiler gets them
    tokens_BT, labels_BT, ids_BT = packed_batch(BATCHES[0])
    model(tokens_BT, PackMeta.from_document_ids(ids_BT), labels_BT)
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def assert_compiled_equals_eager(pattern, compiler, chunk_size=16, batches=BATCHES, **moe_changes):
    weights = {"auxiliary_loss_weight": 0.1, "sequence_loss_weight": 0.1, "z_loss_weight": 0.1}
    moe = MOE.model_copy(update=weights | moe_changes)
    # Two chunks per row: each is unrolled into the graph.
    config = small_config(pattern, moe=moe, mamba=MAMBA.model_copy(update={"chunk_size": chunk_size}))
    eager, compiled = (small_model(config, dtype=torch.float32) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_blocks(compiler=compiler)
    for seed, lengths in enumerate(batches):
        tokens_BT, labels_BT, ids_BT = packed_batch(lengths, seed=seed)
        meta = PackMeta.from_document_ids(ids_BT)
        losses = []
        for model in (eager, compiled):
            model.zero_grad()
            loss = loss_of(model(tokens_BT, meta, labels_BT))
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for (name, expected), parameter in zip(eager.named_parameters(), compiled.parameters()):
            difference, scale = (parameter.grad - expected.grad).norm(), expected.grad.norm()
            # float32; a decay's gradient is a small difference of large sums.
            assert difference <= 5e-5 * scale + 1e-9, f"{name}: off by {difference:.3g} of {scale:.3g}"
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


# Graphs are made by Dynamo, and what they compute in them by Autograd, which the smallest quick test below traces as well.
COMPILERS = pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])


@COMPILERS
def test_blocks_of_a_kind_share_their_graphs(compiler):
    # Mamba2 has one graph for rows with document boundaries and one for rows without; dense blocks do not look.
    assert assert_compiled_equals_eager("M-M-", compiler) == 3


@pytest.mark.parametrize(
    ("compiler", "graphs"),
    [
        ("aot_eager", 1),
        pytest.param("aot_eager", 2, marks=pytest.mark.slow),
        pytest.param("eager", 2, marks=pytest.mark.slow),
    ],
)
def test_rows_no_longer_than_a_chunk_compile(compiler, graphs):
    # The first batch has document boundaries, the second none.
    assert assert_compiled_equals_eager("M", compiler, chunk_size=23, batches=BATCHES[:graphs]) == graphs


@COMPILERS
def test_blocks_that_recycle_choices_share_a_graph_though_each_draws_its_own_seats(compiler):
    assert assert_compiled_equals_eager("EE", compiler, capacity_factor=1.0, overflow="recycle") == 1


def test_the_dtype_of_products_breaks_no_graph_in_bfloat16():
    assert count_graph_breaks("M-*E", torch.bfloat16) == 0


@pytest.mark.slow
def test_the_default_compiler_agrees_with_eager():
    assert assert_compiled_equals_eager("ME*-M*E", "inductor") == 6
