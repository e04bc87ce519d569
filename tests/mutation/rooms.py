"""Rooms that promise correctness, and the quick tests that hold them to it, the cheapest first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """Source files, and arguments of pytest: files, folders or single tests."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]


ROOMS: dict[str, Room] = {
    "samples": Room(
        ("data_pipeline/samples/samples.py",),
        ("tests/data_pipeline/samples", "tests/data_pipeline/loader/test_loader.py"),
    ),
    "packing": Room(
        ("data_pipeline/samples/packing.py", "model/packing.py"),
        ("tests/data_pipeline/samples", "tests/model/test_packing.py", "tests/data_pipeline/loader/test_loader.py"),
    ),
    "store": Room(
        ("data_pipeline/store/store.py",),
        ("tests/data_pipeline/store/test_store.py", "tests/data_pipeline/store/test_manifest.py",
         "tests/data_pipeline/test_verify.py", "tests/data_pipeline/store/test_object_store.py"),
    ),
    "commit": Room(
        ("pretrain/checkpoint/commit.py",),
        ("tests/pretrain/checkpoint/test_commit.py", "tests/pretrain/checkpoint/test_save.py",
         "tests/pretrain/checkpoint/test_damage.py", "tests/faults/test_crash_states.py"),
    ),
    "remote": Room(
        ("pretrain/checkpoint/remote.py",),
        ("tests/pretrain/checkpoint/test_remote.py",),
    ),
    "load": Room(
        ("pretrain/checkpoint/load.py",),
        ("tests/pretrain/checkpoint/test_save.py", "tests/pretrain/checkpoint/test_damage.py",
         "tests/pretrain/checkpoint/test_check_resumable.py", "tests/pretrain/checkpoint/test_placement.py",
         "tests/pretrain/checkpoint/test_frozen.py"),
    ),
    "fragments": Room(
        ("pretrain/checkpoint/fragments.py",),
        ("tests/pretrain/checkpoint/test_save.py", "tests/pretrain/checkpoint/test_placement.py",
         "tests/pretrain/checkpoint/test_frozen.py"),
    ),
    "buckets": Room(
        ("pretrain/engine/buckets.py",),
        ("tests/pretrain/engine/test_buckets.py", "tests/pretrain/test_ranks.py"),
    ),
    "gradients": Room(
        ("pretrain/engine/gradients.py",),
        ("tests/pretrain/engine/test_gradients.py", "tests/pretrain/test_pipeline.py", "tests/parallel/test_layouts.py"),
    ),
    "grad_norm": Room(
        ("pretrain/engine/grad_norm.py",),
        ("tests/pretrain/engine", "tests/pretrain/test_ranks.py", "tests/parallel/test_layouts.py"),
    ),
    "step_sums": Room(
        ("pretrain/step_sums.py",),
        ("tests/pretrain/test_step_sums.py", "tests/pretrain/test_train.py", "tests/pretrain/test_parallel.py"),
    ),
    "context": Room(
        ("model/parallel/context.py",),
        ("tests/model/parallel/test_context.py", "tests/model/mixers/test_mixers.py"),
    ),
    "dispatch": Room(
        ("model/moe/dispatch.py", "model/moe/by_rank.py", "model/moe/by_slot.py", "model/moe/transfer.py"),
        ("tests/model/moe",),
    ),
    "corruption": Room(
        ("pretrain/monitor/corruption.py",),
        ("tests/pretrain/monitor/test_corruption.py",),
    ),
    "verify": Room(
        ("pretrain/export/verify.py",),
        ("tests/pretrain/export/test_verify.py", "tests/pretrain/export/test_export.py"),
    ),
    "plan memory": Room(
        ("launch/plan/memory.py",),
        ("tests/launch/plan/test_memory.py", "tests/launch/plan/test_plan.py"),
    ),
}  # fmt: skip
