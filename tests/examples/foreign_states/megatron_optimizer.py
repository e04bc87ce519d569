"""Steps a hybrid of megatron-core by its DistributedOptimizer on CPU ranks, and saves its states in its forms.

No forward pass: gradients are drawn, the same on all data ranks, where reduced ones would be.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, param_and_grad_buffer
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from tests.examples.foreign_states import megatron_models as models
from tests.examples.foreign_states.megatron_training import WithoutGpu
from tests.helpers.patience import PATIENCE_SECONDS

STEPS = 3
# States put together here, not by megatron-core.
GATHERED = "gathered"
# Numbers, so that a rank's parameters are in several buckets.
BUCKET_NUMEL = 2000


def draw(name: str, weight: torch.nn.Parameter, seed: int) -> torch.Tensor:
    """Numbers by the name of a weight, and by rank where ranks have parts of their own."""
    own = 0
    if getattr(weight, "tensor_model_parallel", False):
        own += 1 + parallel_state.get_tensor_model_parallel_rank()
    if not getattr(weight, "allreduce", True):
        own += 10 * (1 + parallel_state.get_expert_model_parallel_rank())
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {own} {seed}".encode()))
    return torch.randn(weight.shape, generator=generator)


def gathered_states(model: torch.nn.Module, optimizers: Sequence[Any], of_model: dict[str, Any]) -> dict[str, Any]:
    """States by parameters, of what each data rank's part of the optimizer holds in memory."""
    states: dict[str, Any] = {"common_step": STEPS}
    weights = list(model.parameters())
    places = get_param_id_to_sharded_param_map(of_model, weights)
    for index, weight in enumerate(weights):
        (owner,) = (each for each in optimizers if any(weight in buffer.param_index_map for buffer in each.buffers))
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            whole = torch.zeros(weight.numel())
            if weight in owner.model_param_gbuf_map:
                part = owner._get_model_param_range_map(weight)["param"]
                whole[part.start : part.end] = owner._get_main_param_and_optimizer_states(weight)[kind]
            torch.distributed.all_reduce(whole, group=owner.data_parallel_group)
            states[f"{index} {kind}"] = make_sharded_optimizer_tensor(
                places[index], whole.view(weight.shape), f"optimizer.state.{kind}"
            )
    return states


def write_states(folder: str, settings: dict[str, Any], layout: dict[str, Any], kinds: Sequence[str]) -> list[int]:
    """Step a model in bf16 and save it once for each form; returns how many numbers this rank's dense buckets have."""
    initialize_parallel(ParallelConfig(**layout), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    with models.on_cpu(), WithoutGpu(), pytest.MonkeyPatch.context() as patch:
        # Gloo does not gather several tensors at once.
        patch.setattr(param_and_grad_buffer, "_coalescing_manager", lambda *_, **__: nullcontext())
        config = models.transformer_config(
            **settings,
            tensor_model_parallel_size=layout.get("tensor", 1),
            expert_model_parallel_size=layout.get("expert", 1),
            expert_tensor_parallel_size=1,
            bf16=True,
            params_dtype=torch.bfloat16,
        )
        model = models.hybrid(config, "ME*-").bfloat16()
        for name, weight in model.named_parameters():
            weight.data.add_(draw(name, weight, 0), alpha=0.1)
        buckets = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            bucket_size=BUCKET_NUMEL,
            grad_reduce_in_fp32=True,
        )
        parallel = DistributedDataParallel(config, buckets, model)
        rates = OptimizerConfig(
            optimizer="adam", lr=1e-2, clip_grad=0.0, bf16=True, use_distributed_optimizer=True, weight_decay=0.1
        )
        optimizer = get_megatron_optimizer(rates, [parallel], use_gloo_process_groups=False)
        for step in range(STEPS):
            for name, weight in model.named_parameters():
                weight.main_grad.copy_(draw(name, weight, step + 1))
            assert optimizer.step()[0]
        for kind in kinds:
            metadata = {"distrib_optim_sharding_type": kind, "chained_optim_avoid_prefix": True}
            of_model = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
            if kind == GATHERED:
                states = gathered_states(model, optimizer.chained_optimizers, of_model)
            else:
                states = optimizer.sharded_state_dict(of_model, metadata=metadata)
            whole = {"model": of_model, "optimizer": states, "iteration": STEPS + 1}
            target = Path(folder, kind)
            target.mkdir(exist_ok=True)
            strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group)
            dist_checkpointing.save(whole, str(target), strategy)
        return [bucket.grad_data.numel() for buffer in parallel.buffers for bucket in buffer.buckets]
