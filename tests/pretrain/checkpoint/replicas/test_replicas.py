"""Replicas in the memory of nodes: two nodes of two ranks each on this machine, ranks killed, nodes lost, copies damaged."""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

import amfm.pretrain.checkpoint.replicas.replica
import amfm.pretrain.train
from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checkpoint import manifest_file
from amfm.pretrain.checkpoint.background import BackgroundSaver
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints
from amfm.pretrain.checkpoint.replicas.memory import NodeMemory
from amfm.pretrain.checkpoint.replicas.replica import SavedReplica
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.train import train
from tests.faults.attempt import Attempt, die_in
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import IDENTITIES, make_engine, toy_config
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config

STEPS, SAVED, LAST = 8, 4, 6
HOSTS = ("node-a", "node-a", "node-b", "node-b")
VICTIM = 3


def settings(memory: Path, **others: Any) -> dict[str, Any]:
    """Checkpoints after steps 4 and 8, replicas after all others; both waited for, so that it is known what stands."""
    return {
        "train__steps": STEPS,
        "train__checkpoint_every_steps": SAVED,
        "train__checkpoint_in_background": False,
        "train__replica_every_steps": 1,
        "train__replica_folder": str(memory),
        "train__timeout_seconds": PATIENCE_SECONDS,
        **others,
    }


def replicas_of(memory: Path) -> list[list[str]]:
    """Names of the replicas of each node."""
    return sorted([path.name for path in list_checkpoints(node)] for node in memory.iterdir())


def read_losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run_dir)}


def read_told(run_dir: Path) -> list[str]:
    """What the newest start said of replicas."""
    told: list[str] = []
    for event in read_events(run_dir):
        if event["event"] == "start":
            told = []
        elif event["event"] == "replicas":
            told.append(event["text"])
    return told


def start(
    data: DataConfig,
    run_dir: Path,
    settings: dict[str, Any],
    num_ranks: int,
    prepare: Callable[[int], None] | None = None,
) -> list[int]:
    """Exit codes of one start of a run."""
    attempt = Attempt(data, run_dir, settings, num_ranks, prepare)
    attempt.start()
    return attempt.finish()


def always() -> bool:
    return True


def die_before_step(number: int, rank: int) -> None:
    """Before the step of that number begins, counted from 0 in this start."""
    die_in(amfm.pretrain.train, "apply_stage", number, always)


def run_alone(data: DataConfig, place: Path) -> None:
    """One rank that is killed and started again, and one that is not."""
    memory = place / "memory"
    memory.mkdir()
    own = settings(memory, model__pattern="E-")
    assert start(data, place / "straight", {"train__steps": STEPS, "model__pattern": "E-"}, 1) == [0]
    assert start(data, place / "run", own, 1, partial(die_before_step, 3)) == [-9]
    shutil.copytree(memory, place / "left")
    assert start(data, place / "run", own, 1) == [0]


def test_a_start_goes_on_from_memory_and_an_end_in_order_leaves_nothing(data: DataConfig, tmp_path: Path) -> None:
    run_ranks(run_alone, data, tmp_path, num_ranks=1)
    assert replicas_of(tmp_path / "left") == [["step-00000003"]]
    assert [event["resumed_from"] for event in read_events(tmp_path / "run", "start")] == [None, "step-00000003"]
    assert read_told(tmp_path / "run") == [
        "step 3 comes from the memory of 1 of 1 nodes",
        f"in {tmp_path / 'memory'} of one node: they outlive its ranks and not the node",
    ]
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "straight")
    assert list((tmp_path / "memory").iterdir()) == []


def test_a_replica_that_fails_is_a_remark_and_leaves_the_one_before(tmp_path: Path) -> None:
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    saver = BackgroundSaver(make_engine(parallel), timeout_seconds=PATIENCE_SECONDS)
    saver.replicas = memory = NodeMemory.of(str(tmp_path), tmp_path / "run", saver.ranks)
    memory.token = "0" * 32
    config = toy_config()
    memory.check_memory(saver.measure(config), saver.ranks)
    for step in (1, 2):
        saver.replicate(step, state={}, config=config, identities=IDENTITIES)
        saved = saver.wait()
        assert isinstance(saved, SavedReplica) and saved.problem is None and saved.num_bytes == saver.measure(config)
        assert replicas_of(tmp_path) == [[f"step-0000000{step}"]]
    memory.directory().chmod(0o777)
    saver.replicate(3, state={}, config=config, identities=IDENTITIES)
    saved = saver.wait()
    assert isinstance(saved, SavedReplica) and saved.problem is not None
    assert saved.problem.startswith(f"rank 0: train.replica_folder: {memory.directory()} must be a folder of this user")
    assert replicas_of(tmp_path) == [["step-00000002"]]
    with pytest.raises(RuntimeError, match="that no one else can write to"):
        memory.list_generations(memory.token, 0)
    with pytest.raises(
        RuntimeError, match=r"replica_folder=.* cannot keep replicas: rank 0: .* bytes free, and two replicas"
    ):
        memory.check_memory(1 << 60, saver.ranks)
    (tmp_path / memory.directory().name.replace("0" * 32, "1" * 32)).mkdir()
    (tmp_path / "amfm-of-others").mkdir()
    assert memory.clear() == [] and list(tmp_path.iterdir()) == [tmp_path / "amfm-of-others"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__replica_every_steps": 4}, "train.replica_every_steps = 4: must be less than train.checkpoint_every"),
        (
            {"train__replica_every_steps": None},
            "train.replica_folder = /memory: has no effect without train.replica_ev",
        ),
        ({"train__replica_folder": "shm"}, "train.replica_folder = shm: must be absolute"),
    ],
)
def test_settings_without_effect_are_refused(data: DataConfig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_run(tiny_config(data, Path("run"), **settings(Path("/memory"), **changes)))


def test_a_folder_that_is_not_there_is_refused_before_the_first_step(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"train.replica_folder=.* cannot keep replicas: rank 0: No such file .*/none"
    ):
        train(tiny_config(data, tmp_path / "run", **settings(tmp_path / "none")))
    assert not (tmp_path / "run" / "events.jsonl").exists()


# Two nodes. A fault: which ranks die and where, and what is done to the memory before the next start.

Harm = Callable[[Path, Path], None]


def folder_of(run_dir: Path, memory: Path, host: str) -> Path:
    digest = hashlib.sha256(f"{run_dir.resolve()}\0{host}".encode()).hexdigest()[:12]
    (found,) = memory.glob(f"amfm-{digest}-*")
    return found


def nothing(run_dir: Path, memory: Path) -> None:
    """The memory stays as the ranks left it."""


def lose_node(run_dir: Path, memory: Path) -> None:
    """The victim's node, with its memory."""
    shutil.rmtree(folder_of(run_dir, memory, HOSTS[VICTIM]))


def lose_both_copies(run_dir: Path, memory: Path) -> None:
    lose_node(run_dir, memory)
    (kept,) = folder_of(run_dir, memory, HOSTS[0]).glob(f"step-*/rank-0000{VICTIM}.safetensors")
    kept.unlink()


def lose_all(run_dir: Path, memory: Path) -> None:
    for node in memory.iterdir():
        shutil.rmtree(node)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_one(run_dir: Path, memory: Path) -> None:
    damage(folder_of(run_dir, memory, HOSTS[0]) / f"step-0000000{LAST}" / "rank-00000.safetensors")


def damage_both(run_dir: Path, memory: Path) -> None:
    for host in ("node-a", "node-b"):
        damage(folder_of(run_dir, memory, host) / f"step-0000000{LAST}" / "rank-00000.safetensors")


def damage_manifest(run_dir: Path, memory: Path) -> None:
    damage(folder_of(run_dir, memory, HOSTS[0]) / f"step-0000000{LAST}" / "manifest.json")


def in_step(victims: tuple[int, ...], rank: int) -> None:
    """In the step after the last replica."""
    if rank in victims:
        die_before_step(LAST, rank)


def while_sending(rank: int) -> None:
    """Replicas are sent after steps 1, 2, 3, 5 and 6."""
    if rank == VICTIM:
        die_in(torch.distributed, "isend", 4, always)


def before_commit(rank: int) -> None:
    """The first rank of the second node, before it commits the replica of step 6; the first node may have committed it."""
    if rank == 2:
        die_in(amfm.pretrain.checkpoint.replicas.replica, "commit", 4, always)


FAULTS: dict[str, tuple[Callable[[int], None], Harm, int, str]] = {
    "a rank killed": (partial(in_step, (VICTIM,)), nothing, 6, "step 6 comes from the memory of 2 of 2 nodes"),
    "a node lost": (partial(in_step, (2, 3)), lose_node, 6, "step 6 comes from the memory of 1 of 2 nodes"),
    "both copies lost": (
        *(partial(in_step, (2, 3)), lose_both_copies, 4),
        "the replica of step 6 is passed over: 1 of 4 files are on none of the nodes, the first rank-00003.safetensors",
    ),
    "all memory lost": (
        partial(in_step, (0, 1, 2, 3)),
        lose_all,
        4,
        "no whole replica beyond step 4 in the memory of 2",
    ),
    "a copy damaged": (partial(in_step, (VICTIM,)), damage_one, 6, "rank-00000.safetensors: "),
    "a manifest damaged": (partial(in_step, (VICTIM,)), damage_manifest, 6, "manifest.json"),
    "both copies damaged": (partial(in_step, (VICTIM,)), damage_both, 4, "the replica of step 6 is passed over: "),
    "killed while it is sent": (while_sending, nothing, 5, "step 5 comes from the memory of 2 of 2 nodes"),
    "killed before a commit": (before_commit, nothing, 0, " of 2 nodes"),
}


def be_on_node(fault: Callable[[int], None] | None, rank: int) -> None:
    socket.gethostname = lambda: HOSTS[rank]
    if fault is not None:
        fault(rank)


def lose(data: DataConfig, place: Path, parallel: dict[str, Any]) -> None:
    """A run without faults or replicas, then one for each fault, started again after it."""
    plain = {"train__micro_batch_size": 1, **parallel}
    assert start(data, place / "straight", {"train__steps": STEPS, **plain}, len(HOSTS)) == [0] * len(HOSTS)
    for name, (fault, harm, _, _) in FAULTS.items():
        run_dir, memory = place / name, place / f"memory of {name}"
        run_dir.mkdir()
        memory.mkdir()
        for kills in (fault, None):
            prepare = partial(be_on_node, kills)
            codes = start(data, run_dir, settings(memory, **plain), len(HOSTS), prepare)
            if kills is not None:
                assert -9 in codes and set(codes) <= {-9, 3}, (name, codes)
                harm(run_dir, memory)
        said = {path.name: path.read_text() for path in run_dir.glob("error-*.txt")}
        assert codes == [0] * len(HOSTS), (name, codes, said)
        assert list(memory.iterdir()) == [], name


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [{"parallel__zero_stage": 1, "parallel__tensor": 2}, {"parallel__zero_stage": 3, "train__precision": "bf16"}],
    ids=["tensor and ZeRO 1", "ZeRO 3"],
)
def test_two_nodes_lose_ranks_memory_and_copies(data: DataConfig, tmp_path: Path, parallel: dict[str, Any]) -> None:
    run_ranks(lose, data, tmp_path, parallel, num_ranks=1)
    losses = read_losses(tmp_path / "straight")
    last = f"checkpoints/step-0000000{STEPS}"
    for name, (_, _, step, words) in FAULTS.items():
        resumed = [event["resumed_from"] for event in read_events(tmp_path / name, "start")]
        assert resumed[0] is None and resumed[1] in (
            [f"step-0000000{step}"] if step else ["step-00000005", "step-00000006"]
        )
        told = read_told(tmp_path / name)
        assert any(words in text for text in told), (name, told)
        assert told[-1].endswith("of 2 nodes, each rank's on two of them")
        assert read_losses(tmp_path / name) == losses, name
        difference = diff_checkpoints(tmp_path / "straight" / last, tmp_path / name / last)
        assert difference["tensors"] == {} and difference["state"] == {}, (name, difference)


def be_in_blocks(fault: Callable[[int], None] | None, rank: int) -> None:
    """Of two ranks, whose files share a folder."""
    manifest_file.BLOCK_RANKS = 2
    be_on_node(fault, rank)


def go_on_with_one_node(data: DataConfig, place: Path) -> None:
    """A node is lost for good, and the run continues with the other in another layout; replicas are written during
    training.
    """
    memory, run_dir = place / "memory", place / "run"
    memory.mkdir()
    run_dir.mkdir()
    both = settings(memory, train__micro_batch_size=1, train__checkpoint_in_background=True, parallel__zero_stage=2)
    assert -9 in start(data, run_dir, both, 4, partial(be_in_blocks, partial(in_step, (2, 3))))
    lose_node(run_dir, memory)
    assert start(data, run_dir, {**both, "parallel__tensor": 2}, 2, partial(be_in_blocks, None)) == [0, 0]


@pytest.mark.slow
def test_a_replica_serves_another_layout_on_fewer_nodes(data: DataConfig, tmp_path: Path) -> None:
    run_ranks(go_on_with_one_node, data, tmp_path, num_ranks=1)
    _, resumed = [event["resumed_from"] for event in read_events(tmp_path / "run", "start")]
    # Steps may be faster than what is written next to them.
    assert resumed in ("step-00000003", "step-00000004", "step-00000005", "step-00000006")
    if resumed != "step-00000004":
        assert read_told(tmp_path / "run")[0] == f"step {resumed[-1]} comes from the memory of 1 of 1 nodes"
    assert sorted(read_losses(tmp_path / "run")) == list(range(1, STEPS + 1))
