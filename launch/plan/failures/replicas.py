"""What a save holds of a host's memory, and what `train.replica_every_steps` costs: memory, bytes between nodes, seconds.

A save is a copy in the host's memory, which a thread writes while training continues, and which stays for the next save
(checkpoint/background.py): 12 bytes for each parameter whose master the rank holds, in pinned memory.

A rank puts into a replica what it puts into a checkpoint: float32 master weights and moments, its share of what several ranks hold.
Each node keeps its own ranks' files and those of the node before, in two generations while a new one is written. The rank of
the most loaded pipeline stage stands for all, so that this is what a host must have at most. Hashing and sockets are assumed at
what one core does; both run in parallel with training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from amfm.launch.plan.activations import FLOAT32_BYTES
from amfm.launch.plan.estimate import Estimate
from amfm.launch.plan.hardware import GIB, Hardware
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.pretrain.checkpoint.replicas.memory import GENERATIONS
from amfm.pretrain.config.schema import RunConfig

HASHED_BYTES_PER_SECOND = 0.35e9  # SHA-256, a look for NaN and the write into memory, on one core of an AMD EPYC
SOCKET_BYTES_PER_SECOND = 1.0e9  # of gloo between two ranks, where the network has more
# PyTorch rounds each pinned tensor up to a power of two: 1 / ln 2 of sizes that are spread evenly.
PINNED = 1.44
HOST_SHARE = 0.9  # of a host's memory, for saves and replicas; processes, workers and the page cache have the rest


@dataclass(frozen=True)
class ReplicaCost:
    """Bytes of a node: what two generations take, the copy that a save makes first, and what a replica sends to the next node.

    `seconds`: from the copy until the replica stands. `most_lost_seconds`: of training, by a failure, where only checkpoints
    lose `most_lost_without_seconds` (None if the run saves only at its end).
    """

    every_steps: int
    nodes: int
    node_bytes: float
    staged_bytes: float
    sent_bytes: float
    seconds: float
    most_lost_seconds: float
    most_lost_without_seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """The fields, bytes rounded."""
        return {name: round(value) if name.endswith("_bytes") else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a host that the copies of a save take, of its ranks together, and replicas; `room_bytes`: what it has, None: unknown."""

    ranks: int
    rank_bytes: float
    save_bytes: float
    replica_bytes: float
    room_bytes: float | None

    def problem(self) -> str | None:
        """Why a host does not have this, and what to do; None if it has, or where no one knows."""
        need = self.save_bytes + self.replica_bytes
        if self.room_bytes is None or need <= HOST_SHARE * self.room_bytes:
            return None
        more = f" and replicas {self.replica_bytes / GIB:,.0f} GiB" if self.replica_bytes else ""
        return (
            f"a save holds {self.save_bytes / GIB:,.0f} GiB of each host ({self.rank_bytes / GIB:,.1f} GiB per rank, {self.ranks} "
            f"ranks, rounded up as pinned memory is){more}, more than {HOST_SHARE:.0%} of its {self.room_bytes / GIB:,.0f} GiB: use "
            "more data ranks (ZeRO spreads what is saved), more nodes, or hosts with more memory"
        )


def estimate_host(config: RunConfig, item: Estimate, hardware: Hardware) -> HostMemory:
    """What saves and replicas of a run take of each host's memory in an estimated layout."""
    layout = item.layout
    rank_bytes = max(saved_bytes_by_stage(config, layout))
    ranks = min(layout.ranks, hardware.gpus_per_node)
    # States in bf16 widen on the host before they are copied.
    copies = PINNED + (config.optimizer.state_dtype == "bf16")
    replicas = estimate_replicas(config, item, hardware)
    return HostMemory(
        ranks=ranks,
        rank_bytes=rank_bytes,
        save_bytes=copies * ranks * rank_bytes,
        replica_bytes=0.0 if replicas is None else replicas.node_bytes,
        room_bytes=None if hardware.host_memory_gib is None else GIB * hardware.host_memory_gib,
    )


def saved_bytes_by_stage(config: RunConfig, layout: Layout) -> list[float]:
    """Bytes that a rank of each pipeline stage writes into a checkpoint: float32 master weights, moments and averages, its share of them."""
    stages = held_by_stages(config.model, layout, config.train.sequence_length, config.optimizer.matrix_settings())
    matrices = [held.own_matrices(layout) for held in stages]
    tensors = 3 + (config.ema is not None)
    return [
        FLOAT32_BYTES * (tensors * held.share(layout) - own.dense - own.routed) for held, own in zip(stages, matrices)
    ]


def estimate_replicas(config: RunConfig, item: Estimate, hardware: Hardware) -> ReplicaCost | None:
    """Cost of a run's replicas in an estimated layout; None if it writes none."""
    every, saves = config.train.replica_every_steps, config.train.checkpoint_every_steps
    if every is None:
        return None
    layout = item.layout
    rank_bytes = max(saved_bytes_by_stage(config, layout))
    on_node = min(layout.ranks, hardware.gpus_per_node)
    nodes = -(-layout.ranks // on_node)
    copies = 2 if nodes > 1 else 1
    rate = min(SOCKET_BYTES_PER_SECOND, hardware.link_efficiency * hardware.network_bytes_per_second)
    seconds = rank_bytes / HASHED_BYTES_PER_SECOND + (copies - 1) * rank_bytes / rate
    step = item.step.total()
    return ReplicaCost(
        every_steps=every,
        nodes=nodes,
        node_bytes=GENERATIONS * copies * on_node * rank_bytes,
        staged_bytes=on_node * rank_bytes,
        sent_bytes=(copies - 1) * on_node * rank_bytes,
        seconds=seconds,
        # One begins when the one before stands, and serves only when it stands itself.
        most_lost_seconds=max(every * step, seconds) + seconds,
        most_lost_without_seconds=None if saves is None else saves * step,
    )
