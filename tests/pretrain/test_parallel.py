"""Groups and sockets of a rank: few, however many ranks there are."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import psutil
import pytest
import torch
import torch.distributed

from amfm.launch.rank_command import isolated_python
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import choose_gpu, choose_threads, count_cores, initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks

SIMULATED = """
import json, sys
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron.core import parallel_state
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
ranks, section = int(sys.argv[1]), json.loads(sys.argv[2])
dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
made, own = [], dist.new_group
dist.new_group = lambda ranks=None, **settings: (made.append(len(ranks)), own(ranks, **settings))[1]
initialize_parallel(ParallelConfig(**section), timeout_seconds=900, num_threads=1)
held = [group for group in parallel_state._global_process_group_list if group is not None]
print(json.dumps({"made": made, "held": [group.size() for group in held]}))
"""
TURBOS = {"tensor": 2, "sequence_parallel": True, "expert": 32, "pipeline": 16}


def simulate(ranks: int, section: dict[str, Any]) -> dict[str, list[int]]:
    command = [*isolated_python(), "-W", "ignore", "-c", SIMULATED, str(ranks), json.dumps(section)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS)
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_rank_of_2048_holds_few_groups_and_one_of_its_own() -> None:
    found = simulate(2048, TURBOS)
    assert len(found["held"]) <= 24
    assert found["held"].count(1) == found["made"].count(1) == 1


def test_a_task_that_sees_one_gpu_takes_it_and_a_rank_without_one_is_told_both_numbers() -> None:
    assert [choose_gpu(rank, 8) for rank in (0, 7)] == [0, 7]
    assert [choose_gpu(rank, 1) for rank in (0, 5)] == [0, 0]
    with pytest.raises(RuntimeError, match=r"local rank 4 has no GPU: this process sees 4; .*--gpus-per-task"):
        choose_gpu(4, 4)


def connect(section: dict[str, Any]) -> list[tuple[int, int]]:
    """Sockets of this process after the groups are made, and after every rank has talked to all."""
    counts = []
    parallel = initialize_parallel(ParallelConfig(**section), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    process = psutil.Process()
    counts.append(len(process.net_connections()))
    for group in (parallel.groups.tp, parallel.groups.pp, parallel.groups.dp_cp):
        torch.distributed.all_reduce(torch.ones(1), group=group)
    assert parallel.gather_objects("here") == ["here"] * parallel.world_size
    counts.append(len(process.net_connections()))
    return [(counts[0], counts[1])]


def test_sockets_do_not_grow_with_the_square_of_the_ranks() -> None:
    two, four = (
        run_ranks(connect, section, num_ranks=ranks) for ranks, section in ((2, {}), (4, {"tensor": 2, "pipeline": 2}))
    )
    # A listener a group, and neighbours in rings; a mesh of every group were 3 for each of 16 groups.
    assert max(made for ((made, _),) in four) <= 24
    assert max(used for ((_, used),) in four) <= max(used for ((_, used),) in two) + 16


def test_threads_are_those_that_the_user_set_else_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = count_cores()
    for given, threads in {"1": 1, "3,2": 3, "": cores, "0": cores, "many": cores}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert choose_threads(1) == threads, given
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun set it, and not the user
    assert choose_threads(1) == cores and choose_threads(10_000) == 1
