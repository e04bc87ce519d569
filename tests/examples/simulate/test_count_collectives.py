"""Counted bytes are those of calls whose sizes are known, in forward and backward, by axis."""

from __future__ import annotations

import torch
import torch.distributed as dist
from amfm_simulate.count_collectives import CommunicationCounter, Traffic
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.shards import sum_traffic
from tests.helpers.spawn import run_ranks


def call_everything() -> list[Traffic]:
    parallel = initialize_parallel(ParallelConfig(tensor=2), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    groups = parallel.groups
    dist.all_reduce(torch.ones(5))
    with CommunicationCounter(groups) as counter:
        x = torch.ones(3, 4, requires_grad=True)
        gather_from_tensor_model_parallel_region(x, group=groups.tp).sum().backward()
        dist.all_reduce(torch.ones(6), group=groups.tp)
        dist.all_reduce(torch.ones(6, dtype=torch.bfloat16), group=groups.tp)
        dist.reduce_scatter_tensor(torch.empty(5), torch.ones(10), group=groups.tp)
        # Rank 0 keeps 1 row of 3 numbers and sends 4, rank 1 keeps 2 and sends 2.
        splits = [[1, 4], [2, 2]][parallel.rank]
        received = [1, 2] if parallel.rank == 0 else [4, 2]
        dist.all_to_all_single(
            torch.empty(sum(received), 3), torch.ones(sum(splits), 3), received, splits, group=groups.tp
        )
        dist.broadcast(torch.ones(7), 0, group=groups.tp)
        dist.reduce(torch.ones(7), 1, group=groups.tp)
        dist.all_reduce(torch.ones(9), group=groups.dp)  # one rank
        dist.all_reduce(torch.ones(1))
        dist.barrier()
        if parallel.rank == 0:
            dist.send(torch.ones(8), 1)
        else:
            dist.recv(torch.empty(8), 0)
    dist.all_reduce(torch.ones(5))
    return counter.traffic()


def test_every_collective_is_counted_once_with_its_axis() -> None:
    rows = sum_traffic(run_ranks(call_everything, num_ranks=2))
    assert rows == [
        Traffic("tp", "all_gather", "float32", 2, 2 * 48, 2 * 48),
        Traffic("tp", "all_reduce", "bfloat16", 2, 2 * 12, 2 * 12),
        Traffic("tp", "all_reduce", "float32", 2, 2 * 24, 2 * 24),
        Traffic("tp", "all_to_all", "float32", 2, (5 + 4) * 12, (4 + 2) * 12),
        Traffic("tp", "broadcast", "float32", 2, 28, 28),
        Traffic("tp", "reduce", "float32", 2, 2 * 28, 28),
        Traffic("tp", "reduce_scatter", "float32", 2, 2 * 40, 2 * 20),
        Traffic("world", "all_reduce", "float32", 2, 2 * 4, 2 * 4),
        Traffic("world", "send", "float32", 1, 32, 32),
    ]
