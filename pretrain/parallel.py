"""Ranks, devices and process groups.

The only file that reads the launcher's environment and process-wide parallel state.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed
import torch.utils.deterministic

import amfm.model.parallel  # noqa: F401  # isort: skip  # first, since it guards the import of Megatron-core
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from amfm.kernels.runtime.compiling import use_deterministic_algorithms
from amfm.model.parallel.groups import AXES, ProcessGroupCollection, RowCapacity
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.launcher_protocol import GOES_ON, LAUNCHER_PID
from amfm.pretrain.ranks.group import RankGroup

DATA_PARALLEL = ParallelConfig()


class DataParallelUnit:
    """DeepSpeed's `mpu`: Megatron-core's groups under the names that DeepSpeed asks for.

    DeepSpeed builds no group of its own when it gets this object, so every collective runs on a group that was made
    with the run's timeout. Its model-parallel group is Megatron's tensor x pipeline group; its data-parallel group,
    over which it sums and spreads, is data x context.
    """

    def __getattr__(self, name: str) -> Any:
        """Forward every other question to Megatron-core."""
        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        """Rank in the tensor group."""
        return int(parallel_state.get_tensor_model_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks of the tensor group."""
        return int(parallel_state.get_tensor_model_parallel_world_size())

    def get_data_parallel_group(self) -> torch.distributed.ProcessGroup:
        """Group of the ranks that hold the same dense weights as this one."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks of that group."""
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))

    def get_data_parallel_rank(self) -> int:
        """Rank in that group."""
        return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of that group."""
        return list(torch.distributed.get_process_group_ranks(self.get_data_parallel_group()))


@dataclass(frozen=True)
class Parallel:
    """This process among all: its ranks, its device, the groups to pass down, and DeepSpeed's view of them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    groups: ProcessGroupCollection
    mpu: DataParallelUnit

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes files and the terminal."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Index of this rank's share of the micro-batches.

        Tensor, context and pipeline ranks of one share have the same.
        """
        return int(self.groups.dp.rank())

    @property
    def data_world_size(self) -> int:
        """Number of shares over which the micro-batches are spread."""
        return int(self.groups.dp.size())

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum a tensor over the data ranks in place and return it. Every rank must call this."""
        if self.data_world_size > 1:
            torch.distributed.all_reduce(values, group=self.groups.dp)
        return values

    def all_reduce_unique(self, values: Tensor, *, of_each: Tensor | None = None) -> Tensor:
        """Sum what tensor ranks hold alike over all data, context and pipeline ranks, in place; the same on every rank.

        `of_each`: a vector that differs between all ranks; its sum over them stands after the values, in a new tensor.
        Every rank must call this.
        """
        if self.groups.tp.rank() > 0:
            values.zero_()
        if of_each is not None:
            values = torch.cat([values, of_each])
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def max_over_all(self, values: Sequence[int]) -> list[int]:
        """Compute the maximum of each value over all ranks. Every rank must call this."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return [int(value) for value in tensor.tolist()]

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather every rank's picklable value, in rank order. Every rank must call this."""
        return RankGroup(self.rank, self.world_size).all_gather(value)


def set_deepspeed_accelerator() -> None:
    """Tell DeepSpeed which accelerator to use before it is imported: on its own it guesses, and prints that it did."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def die_with_launcher() -> None:
    """Have this process killed when its launcher dies, however it dies: no orphan may write to the run directory.

    Only on Linux, and only for ranks of `launch/cluster/local.py`.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(launcher):
        raise RuntimeError(f"the launcher (process {launcher}) is gone; this rank does not start without it")


def launcher_goes_on() -> bool:
    """Whether a launcher of ours starts the stages after this layout on as many ranks as each needs."""
    return GOES_ON in os.environ


def is_first_rank() -> bool:
    """Whether this process is rank 0 by its environment, which is known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def record_collectives(folder: Path) -> None:
    """Have torch write its record of the last collectives into a folder, a file per rank, when one times out under
    NCCL.

    Which rank came to which collective is what a hang is explained by (torch's flight recorder); variables that are set
    already win. Call it before the ranks meet; the folder must be there when it is needed.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank-"))


def start_process_group(timeout_seconds: float) -> tuple[int, int, int, int]:
    """Join the default process group and return (rank, world size, local rank, local world size).

    With a launcher's environment (torchrun, launch/cluster/local.py) through its store; without one, a group of only this
    process, which needs no port. Keys carry the attempt's number: a restarted group that reads the last attempt's
    keys hangs (pytorch issue 135712).
    """
    die_with_launcher()
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank, local_world_size
    timeout = timedelta(seconds=timeout_seconds)
    # A connection when it is first used, instead of one to every rank: objects go around in rings and trees.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
    else:
        store, rank, world_size, local_rank, local_world_size = HashStore(), 0, 1, 0, 1
    if torch.cuda.is_available():
        local_rank = choose_gpu(local_rank, torch.cuda.device_count())
    os.environ["LOCAL_RANK"] = str(local_rank)  # by which DeepSpeed takes its device
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return rank, world_size, local_rank, local_world_size


def choose_gpu(local_rank: int, num_visible: int) -> int:
    """Number of the GPU that a local rank takes among those that its process sees.

    A site may show each task only its own one (`--gpus-per-task`, `--gpu-bind=single:1`), which then is number 0. Raises
    RuntimeError if there are several and none for this rank.
    """
    if num_visible == 1:
        return 0
    if local_rank >= num_visible:
        raise RuntimeError(
            f"local rank {local_rank} has no GPU: this process sees {num_visible}; start at most {num_visible} ranks per "
            "node, or show each task its own GPU (Slurm: --gpus-per-task=1)"
        )
    return local_rank


def initialize_parallel(
    section: ParallelConfig = DATA_PARALLEL, *, timeout_seconds: float, num_threads: int | None = None
) -> Parallel:
    """Join the other ranks, build the groups of a layout with Megatron-core, and set threads.

    Every rank must call this.

    The layout must have passed `amfm.pretrain.checks.parallel.layout_problems`. A later call in the same process
    (tests) replaces the groups of the one before, which works no more, unless the layout is the same.
    """
    rank, world_size, local_rank, local_world_size = start_process_group(timeout_seconds)
    if parallel_state.model_parallel_is_initialized() and not _has_sizes(section):
        destroy_groups()
    if not parallel_state.model_parallel_is_initialized():
        with axis_groups():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=section.tensor,
                pipeline_model_parallel_size=section.pipeline,
                context_parallel_size=section.context,
                expert_model_parallel_size=section.expert,
                expert_tensor_parallel_size=section.expert_tensor_size(),
                distributed_timeout_minutes=timeout_seconds / 60,
                create_gloo_process_groups=False,
            )
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        place_megatron_buffers_on_cpu()
    torch.set_num_threads(num_threads or choose_threads(local_world_size))
    groups = ProcessGroupCollection.use_mpu_process_groups(AXES)
    groups.sequence_parallel, groups.overlap_experts = section.sequence_parallel, section.overlap_experts is True
    groups.two_batch = section.overlap_experts == "two_batch"
    groups.row_capacity = (
        None if section.expert_buffer_factor is None else RowCapacity(section.expert_buffer_factor, device)
    )
    return Parallel(rank, world_size, local_rank, local_world_size, device, groups, DataParallelUnit())


@contextmanager
def axis_groups() -> Iterator[None]:
    """Inside the block Megatron-core's groups are only of NCCL on GPUs, and a rank's groups of size 1 are one.

    The default group also carries objects between processors, over gloo, and every group inherits that: at 1,024 ranks
    a mesh of sockets for each of 2,652 groups, above what a process may open. Axes carry tensors of the device only. A
    group of one rank talks to no one, and making it costs every rank a round through the store: with many axes of size
    1 that was most groups. All ranks must enter.
    """
    rank, own = torch.distributed.get_rank(), parallel_state.create_group
    backend = "nccl" if "cuda:nccl" in torch.distributed.get_backend_config() else None
    alone: list[Any] = []

    def create_group(ranks: Sequence[int], **settings: Any) -> Any:
        if len(ranks) > 1:
            return own(ranks, **{**settings, "backend": settings.get("backend") or backend})
        if ranks[0] != rank:
            return torch.distributed.GroupMember.NON_GROUP_MEMBER
        if not alone:
            # Only of this rank, so that no other one need call.
            alone.append(own(ranks, **{**settings, "backend": backend, "use_local_synchronization": True}))
        return alone[0]

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = own


def _has_sizes(section: ParallelConfig) -> bool:
    """Whether Megatron-core's groups in this process have the sizes that the section asks for."""
    present = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    return present == (
        section.tensor,
        section.pipeline,
        section.context,
        section.expert,
        section.expert_tensor_size(),
    )


def destroy_groups() -> None:
    """Destroy the groups of a layout; the default process group stays. Every rank must call this."""
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        torch.distributed.destroy_process_group(group)


def place_megatron_buffers_on_cpu() -> None:
    """Let Megatron-core's layers allocate if there is no CUDA: they ask torch.cuda for the current device."""
    assert not torch.cuda.is_available(), "only for machines without CUDA"
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def count_cores() -> int:
    """Number of processors that this process may use; a container or taskset may give fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_threads(local_world_size: int) -> int:
    """Threads of a rank: OMP_NUM_THREADS where the user set it, else the rank's share of the cores.

    torchrun sets it to 1 for several ranks of a node, whatever the machine, so below it the share is taken.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if given.isdecimal() and int(given) and "TORCHELASTIC_RUN_ID" not in os.environ:
        return int(given)
    return max(1, count_cores() // local_world_size)


def set_determinism(seed: int, deterministic: bool | None = None) -> bool:
    """Seed every generator alike on all ranks, and ask for library kernels whose sums have one order where wanted.

    deterministic: None is yes on a CPU, where it costs nothing, and no on CUDA. Our own kernels add in one order either
    way. On CUDA an operation without such a kernel warns and runs; on CPU all have one. Returns what was chosen.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    chosen = not torch.cuda.is_available() if deterministic is None else deterministic
    if chosen:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    use_deterministic_algorithms(chosen, warn_only=torch.cuda.is_available())
    # Filling costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return chosen


def describe_environment(names: Sequence[str]) -> dict[str, str]:
    """Look up the named environment variables that are set, for the record of a run."""
    return {name: os.environ[name] for name in names if name in os.environ}
