"""What a save, a load and a failure exchange at thousands of ranks: the ranks' real reports over the real tree, without processes.

`python -m tests.pretrain.rehearsal 2048 16384` prints the numbers next to those of a gather to rank 0 and an
all-gather, which the tree replaces. The layout is like that of TurboS: eight pipeline stages, experts over 32 ranks,
and the parameters of a stage in 24 buckets, each spread by ZeRO over the ranks that hold them: so a rank writes a range
or two of each bucket.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from amfm.pretrain.checkpoint.engine_layout import Claims
from amfm.pretrain.checkpoint.files import FileEntry
from amfm.pretrain.checkpoint.manifest_file import encode_manifest
from amfm.pretrain.checkpoint.reader import JoinedReports, RankReport, complete_manifest
from amfm.pretrain.ranks.group import RankTree, relay, up

STAGES, EXPERT_RANKS, LAYERS_PER_STAGE, HIDDEN = 8, 32, 16, 1024
MATRICES = ("mixer.in_proj", "mixer.out_proj", "shared.up", "shared.down")
EXPERTS = ("experts.up", "experts.down")
BUCKET = 4  # parameters, all of experts or none
T = TypeVar("T")


@dataclass
class Rehearsal:
    """Letters between ranks in memory, with what each rank sends and to how many others it talks."""

    letters: dict[tuple[int, int], deque[bytes]] = field(default_factory=lambda: defaultdict(deque))
    peers: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    messages: Counter[int] = field(default_factory=Counter)
    received: Counter[int] = field(default_factory=Counter)
    rank: int = 0

    def send(self, content: bytes, to: int) -> None:
        """Put a letter into the box between two ranks."""
        self.letters[self.rank, to].append(content)
        self.peers[self.rank].add(to)
        self.peers[to].add(self.rank)
        self.messages[self.rank] += 1
        self.received[to] += len(content)

    def receive(self, source: int) -> bytes:
        """Take the oldest letter of a rank."""
        return self.letters[source, self.rank].popleft()

    def up(self, tree: RankTree, value: Callable[[int], T], merge: Callable[[T, T], T]) -> T:
        """Every rank's part, those below first; returns rank 0's result."""
        result = None
        for self.rank in reversed(range(tree.world_size)):
            result = up(tree, self.rank, self, value(self.rank), merge)
        assert result is not None and not any(self.letters.values()), "every letter was read"
        return result

    def down(self, tree: RankTree, value: Any) -> None:
        """Every rank's part, those above first."""
        content = pickle.dumps(value)
        for self.rank in range(tree.world_size):
            relay(tree, self.rank, self, content if self.rank == 0 else b"")


def names_of(stage: int) -> Iterator[tuple[str, list[int], bool]]:
    """Parameters of a stage: name, shape and whether experts cut it."""
    layers = range(stage * LAYERS_PER_STAGE, (stage + 1) * LAYERS_PER_STAGE)
    yield from ((f"blocks.{layer}.{name}.weight", [HIDDEN, HIDDEN], False) for layer in layers for name in MATRICES)
    yield from (
        (f"blocks.{layer}.{name}", [EXPERT_RANKS, HIDDEN, HIDDEN], True) for layer in layers for name in EXPERTS
    )


def report_of(rank: int, world_size: int) -> RankReport:
    """What a rank writes of a checkpoint: its range of the dense state of its stage, and of its experts."""
    stage, place = divmod(rank, world_size // STAGES)
    expert, share = place % EXPERT_RANKS, place // EXPERT_RANKS
    report = RankReport({}, {}, [], {}, {"decay": {"lr": 1e-4}}, FileEntry(410_000_000, f"{rank:064x}"))
    parameters = list(names_of(stage))
    for parts in (parameters[first : first + BUCKET] for first in range(0, len(parameters), BUCKET)):
        of_experts = parts[0][2]
        number, count = (share, world_size // STAGES // EXPERT_RANKS) if of_experts else (place, world_size // STAGES)
        numel = HIDDEN * HIDDEN  # of a shard
        low, high = (len(parts) * numel * n // count for n in (number, number + 1))
        for index in range(low // numel, -(-high // numel)):
            name, shape, _ = parts[index]
            start, stop = max(low, index * numel) - index * numel, min(high, (index + 1) * numel) - index * numel
            report.parameters[name] = {"shape": shape, "dtype": "bfloat16", "group": "decay", "optimizer_step": 9}
            where = {"0": [[expert, expert + 1]]} if of_experts else {}
            report.shards[name] = {"where": where, "coordinates": {"ep": expert} if of_experts else {}}
            report.ranges.append((name, start, stop - start))
    return report


def claims_of(rank: int, world_size: int) -> Claims:
    """What a rank says before it saves: the group that may write each of its shards."""
    stage, place = divmod(rank, world_size // STAGES)
    first, expert = stage * (world_size // STAGES), place % EXPERT_RANKS
    writers: dict[tuple[str, object], int] = {}
    for name, _, of_experts in names_of(stage):
        intervals = (((expert, expert + 1),),) if of_experts else (((0, HIDDEN),),)
        writers[name, intervals] = first + expert if of_experts else first
    return Claims(writers, {})


def rehearse(world_size: int) -> dict[str, float]:
    """Exchange claims, a failure that one rank has, and the reports of a save; returns what that took, and before."""
    tree, post = RankTree(world_size), Rehearsal()
    began = time.perf_counter()
    agreed = post.up(tree, lambda rank: claims_of(rank, world_size), Claims.joined)
    post.down(tree, agreed)
    claims_bytes = post.received[world_size - 1]
    problems = post.up(
        tree, lambda rank: {rank: "disk full"} if rank == 5 else {}, lambda known, more: {**known, **more}
    )
    post.down(tree, problems)
    assert problems == {5: "disk full"}
    before = post.received[0]
    joined = post.up(tree, lambda rank: JoinedReports.of(rank, report_of(rank, world_size)), JoinedReports.joined)
    report_bytes = post.received[0] - before
    exchanged = time.perf_counter()
    manifest = complete_manifest({"step": 1}, joined)
    text = encode_manifest(manifest)
    done = time.perf_counter()
    last = world_size - 1
    return {
        "peers of any rank": max(len(found) for found in post.peers.values()),
        "messages of any rank": max(post.messages.values()),
        "bytes of claims to each rank": claims_bytes,
        "bytes of reports to rank 0": report_bytes,
        "bytes of the manifest": len(text),
        "seconds of all ranks' exchange, in one process": exchanged - began,
        "seconds of the manifest": done - exchanged,
        "before: peers of rank 0": last,
        "before: bytes of claims to each rank": world_size * len(pickle.dumps(claims_of(last, world_size))),
        "before: bytes of reports to rank 0": world_size * len(pickle.dumps(report_of(last, world_size))),
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{int(argument):,} ranks")
        for name, number in rehearse(int(argument)).items():
            print(f"  {name}: {number:,.1f}" if isinstance(number, float) else f"  {name}: {number:,}")
