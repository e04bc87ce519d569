"""Every block kind and the whole model cut over two tensor-parallel ranks: the losses and gradients of one rank."""

import pytest
import torch
import torch.distributed as dist

from model.config import AttentionConfig, Mamba2Config, MoeConfig
from model.groups import single_rank_groups
from model.hybrid import HybridModel
from model.layers import parameter_shards
from model.packing import PackMeta
from pretrain.grads import find_partial_gradients, sum_partial_gradients
from pretrain.parallel import place_megatron_buffers_on_cpu
from tests.helpers.spawn import run_ranks
from tests.model.small_models import loss_of, packed_batch, small_config

MOE = MoeConfig(
    num_experts=5,
    top_k=2,
    expert_hidden_size=8,
    shared_expert_hidden_size=10,
    activation="swiglu",
    latent_size=6,
    auxiliary_loss_weight=0.1,
    z_loss_weight=0.1,
)
CONFIGS = {
    "whole": small_config(
        "ME*-M",
        moe=MOE,
        mamba=Mamba2Config(num_heads=6, head_dim=4, state_size=5, num_groups=2, chunk_size=8),
        logits_z_loss_weight=0.05,
    ),
    "tied": small_config(
        "*E",
        tie_embeddings=True,
        moe=MOE.model_copy(update={"latent_size": None, "activation": "squared_relu"}),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6),
    ),
}


def loss_logits_and_whole_gradients(config, groups, size):
    """The training loss, the logits, and every gradient joined over the ranks of `groups.tp`."""
    model = HybridModel(config, groups, seed=3).double()
    tokens_BT, labels_BT, ids_BT = packed_batch()
    meta = PackMeta.from_document_ids(ids_BT)
    output = model(tokens_BT, meta, labels_BT)
    loss = loss_of(output)
    loss.backward()
    sum_partial_gradients(find_partial_gradients(model, groups), groups)
    with torch.no_grad():
        logits_BTV = model(tokens_BT, meta).logits_BTV
    gradients, values = {}, {}
    for name, parameter, shard in parameter_shards(model):
        for joined, tensor in ((gradients, parameter.grad), (values, parameter.detach())):
            parts = [torch.empty_like(tensor) for _ in range(size)]
            if size > 1:
                dist.all_gather(parts, tensor.contiguous(), group=groups.tp)
            else:
                parts = [tensor]
            over_ranks = [cut for cut in shard.cuts if cut.axis != "ep"]
            if not over_ranks:
                assert all(torch.equal(parts[0], part) for part in parts), f"{name} differs between ranks"
            joined[name] = over_ranks[0].join(parts) if over_ranks else parts[0]
    return loss.detach(), logits_BTV, output.loss.token_nll_R, values, gradients


def run_cut():
    dist.init_process_group("gloo")
    if not torch.cuda.is_available():
        place_megatron_buffers_on_cpu()
    groups = single_rank_groups()
    groups.tp = groups.expt_tp = dist.group.WORLD
    results = {
        name: loss_logits_and_whole_gradients(config, groups, dist.get_world_size()) for name, config in CONFIGS.items()
    }
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def cut_results():
    return run_ranks(run_cut, num_ranks=2)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_tensor_ranks_compute_what_one_does(name, cut_results):
    loss, logits_BTV, token_nll_R, values, gradients = loss_logits_and_whole_gradients(
        CONFIGS[name], single_rank_groups(), 1
    )
    for rank_results in cut_results:
        other_loss, other_logits, other_nll, other_values, other_gradients = rank_results[name]
        for key, value in values.items():
            assert torch.equal(other_values[key], value), key
        # float64: only the order of sums differs; each token's loss is reported in float32.
        torch.testing.assert_close(other_loss, loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other_logits, logits_BTV, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(other_nll, token_nll_R, rtol=1e-5, atol=1e-6)
        assert other_gradients.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(
                other_gradients[key], gradient, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
            )
