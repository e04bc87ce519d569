"""The whole model on Triton's kernels, interpreted, against the torch backend: training, packed sequences and decoding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from amfm.kernels.runtime.backend import INTERPRETED
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.gradients import find_partial_gradients, sum_partial_gradients
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.shards import join_parts
from tests.helpers.spawn import run_ranks
from tests.model.small_models import (
    ATTENTION,
    MAMBA,
    MOE,
    cut_batch,
    loss_of,
    meta_of,
    packed_batch,
    small_config,
    small_model,
)

ROOT = Path(__file__).parents[2]
CONFIG = small_config(
    "ME*-M",
    hidden_size=16,
    mamba=MAMBA.model_copy(update={"head_dim": 16, "state_size": 16, "chunk_size": 16}),
    attention=ATTENTION.model_copy(update={"head_dim": 16}),
    moe=MOE.model_copy(update={"auxiliary_loss_weight": 0.1}),
)

CUT = small_config("M", hidden_size=16, mamba=CONFIG.mamba)
DELTA = {"num_heads": 2, "head_dim": 8, "chunk_size": 16}
DELTAS = {
    "gated_deltanet": small_config("G", hidden_size=16, mixers={"gated_deltanet": DELTA | {"value_head_dim": 12}}),
    "kda": small_config("K", hidden_size=16, mixers={"kda": DELTA}),
}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
def test_triton_backend_agrees_with_torch_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "slow", str(Path(__file__))]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="run by the test above in a process that interprets")
def test_losses_gradients_and_decoding_agree():
    torch_model = small_model(CONFIG, dtype=torch.float32)
    triton_model = small_model(CONFIG, dtype=torch.float32, backend="triton")
    tokens_BT, labels_BT, ids_BT = packed_batch()
    for meta in (PackMeta.from_document_ids(ids_BT), PackMeta.one_document_a_row(2, 23)):
        losses = []
        for model in (torch_model, triton_model):
            model.zero_grad()
            loss = loss_of(model(tokens_BT, meta, labels_BT))
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for (name, expected), parameter in zip(torch_model.named_parameters(), triton_model.parameters()):
            difference, scale = (parameter.grad - expected.grad).norm(), expected.grad.norm()
            # float32; a decay's gradient is a small difference of large sums.
            assert difference <= 5e-5 * scale, f"{name}: off by {difference:.3g} of {scale:.3g}"
    with torch.no_grad():
        full_BTV = torch_model(tokens_BT, PackMeta.one_document_a_row(2, 23)).logits_BTV
        state, pieces = triton_model.empty_state(2), []
        for start, length in ((0, 20), (20, 1), (21, 1), (22, 1)):
            meta = PackMeta.one_document_a_row(2, length, start=start)
            output = triton_model(tokens_BT[:, start : start + length], meta, state=state)
            state = output.state
            pieces.append(output.logits_BTV)
    torch.testing.assert_close(torch.cat(pieces, 1), full_BTV, rtol=1e-4, atol=1e-5)


# Borders after 6, 12 and 18 tokens.
ROWS = ((7, 1, 12, 4), (11, 1, 1, 11), (24,))


CUTS = {
    "context": ParallelConfig(context=2),
    "context, tensor": ParallelConfig(context=2, tensor=2),
    "context, tensor, tokens": ParallelConfig(context=2, tensor=2, sequence_parallel=True),
}


def run_cut_rows(section, config=CUT):
    """The loss and all gradients of one block in Triton, whose rows two context ranks cut, and tensor ranks its heads."""
    groups = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1).groups
    model = HybridModel(config, groups, seed=3, backend="triton")
    assert config is not CUT or model.blocks[0].mixer.is_one_operation
    tokens_BT, labels_BT, meta = cut_batch(ROWS, groups)
    loss = loss_of(model(tokens_BT, meta, labels_BT))
    loss.backward()
    sum_partial_gradients(find_partial_gradients(model, groups), groups)
    results = {name: join_parts(weight.grad, shard, groups) for name, weight, shard in parameter_shards(model)}
    results["loss"] = loss.detach()
    for value in results.values():
        dist.all_reduce(value, group=groups.cp)
    return results


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="run by the test above in a process that interprets")
@pytest.mark.parametrize("cut", CUTS)
def test_context_ranks_in_one_operation_compute_what_one_rank_does(cut):
    assert_ranks_agree(CUTS[cut], CUT)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="run by the test above in a process that interprets")
@pytest.mark.parametrize("kind", DELTAS)
@pytest.mark.parametrize("cut", CUTS)
def test_context_ranks_of_a_delta_block_compute_what_one_rank_does(cut, kind):
    assert_ranks_agree(CUTS[cut], DELTAS[kind])


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="run by the test above in a process that interprets")
@pytest.mark.parametrize("kind", DELTAS)
def test_delta_blocks_agree_with_pytorch_and_decode_on(kind):
    wide = small_model(DELTAS[kind])
    model = small_model(DELTAS[kind], dtype=torch.float32, backend="triton")
    tokens_BT, labels_BT, ids_BT = packed_batch()
    losses = []
    for each in (wide, model):
        loss = loss_of(each(tokens_BT, PackMeta.from_document_ids(ids_BT), labels_BT))
        loss.backward()
        losses.append(loss.detach().double())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for (name, expected), parameter in zip(wide.named_parameters(), model.parameters()):
        difference, scale = (parameter.grad - expected.grad).norm(), expected.grad.norm()
        assert difference <= 5e-5 * scale, f"{name}: off by {difference:.3g} of {scale:.3g}"
    with torch.no_grad():
        full_BTV = wide(tokens_BT, PackMeta.one_document_a_row(2, 23)).logits_BTV
        state, pieces = model.empty_state(2), []
        for start, length in ((0, 20), (20, 1), (21, 2)):
            meta = PackMeta.one_document_a_row(2, length, start=start)
            output = model(tokens_BT[:, start : start + length], meta, state=state)
            state = output.state
            pieces.append(output.logits_BTV)
    torch.testing.assert_close(torch.cat(pieces, 1).double(), full_BTV, rtol=1e-4, atol=1e-5)


def assert_ranks_agree(section, config):
    """Every rank has the loss and the gradients of one rank, in float64, that has whole rows and all heads."""
    ranks = run_ranks(run_cut_rows, section, config, num_ranks=section.context * section.tensor)
    model = HybridModel(config, single_rank_groups(), seed=3).double()
    tokens_BT, labels_BT, ids_BT = packed_batch(ROWS)
    loss = loss_of(model(tokens_BT, meta_of(ids_BT), labels_BT))
    loss.backward()
    wanted = {"loss": loss.detach()} | {name: weight.grad for name, weight in model.named_parameters()}
    for rank, results in enumerate(ranks):
        assert results.keys() == wanted.keys()
        for name, value in wanted.items():
            error, scale = (results[name] - value).norm(), value.norm()
            assert error <= 5e-5 * scale, f"rank {rank}, {name}: off by {error:.3g} of {scale:.3g}"
