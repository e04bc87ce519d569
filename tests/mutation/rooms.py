"""Rooms that promise correctness, and the tests that hold them to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """Source files, and arguments of pytest: the room's own quick tests first, then wider ones for what survives them."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]
    wider: tuple[str, ...] = ()


SLOW = ("-m", "slow or not slow")
CHECKPOINT, ENGINE, SAMPLES = "tests/pretrain/checkpoint", "tests/pretrain/engine", "tests/data_pipeline/samples"
LOADER = "tests/data_pipeline/loader/test_loader.py"

ROOMS: dict[str, Room] = {
    "samples": Room(("data_pipeline/samples/samples.py",), (SAMPLES, LOADER, "tests/data_pipeline/loader/test_phases.py"),
        ("tests/data_pipeline/store/test_object_store.py", "tests/examples/synthetic/test_rows.py"),
    ),
    "packing": Room(
        ("data_pipeline/samples/packing.py", "model/packing.py"),
        (f"{SAMPLES}/test_packing.py", "tests/model/test_packing.py"),
        (LOADER, "tests/examples/synthetic/test_rows.py", "tests/model/test_document_isolation.py"),
    ),
    "store": Room(
        ("data_pipeline/store/store.py",),
        ("tests/data_pipeline/store/test_store.py", "tests/data_pipeline/store/test_manifest.py"),
        ("tests/data_pipeline/test_verify.py", "tests/data_pipeline/store/test_object_store.py", LOADER),
    ),
    "commit": Room(
        ("pretrain/checkpoint/commit.py",),
        (f"{CHECKPOINT}/test_commit.py", f"{CHECKPOINT}/test_save.py"),
        (f"{CHECKPOINT}/test_damage.py", "tests/faults/crash/test_states.py", "tests/faults/test_kill_while_saving.py"),
    ),
    "remote": Room(("pretrain/checkpoint/remote.py",), (f"{CHECKPOINT}/test_remote.py",), (f"{CHECKPOINT}/test_remote.py", *SLOW)),
    "load": Room(
        ("pretrain/checkpoint/load.py",),
        (f"{CHECKPOINT}/test_save.py", f"{CHECKPOINT}/test_check_resumable.py", f"{CHECKPOINT}/test_damage.py"),
        (f"{CHECKPOINT}/test_placement.py", f"{CHECKPOINT}/test_frozen.py", f"{CHECKPOINT}/test_compatibility.py", *SLOW),
    ),
    "fragments": Room(
        ("pretrain/checkpoint/fragments.py",),
        (f"{CHECKPOINT}/test_fragments.py", f"{CHECKPOINT}/test_frozen.py", f"{CHECKPOINT}/test_save.py"),
        (f"{CHECKPOINT}/test_placement.py", "tests/parallel/test_reshard.py", *SLOW),
    ),
    "buckets": Room(("pretrain/engine/buckets.py",), (f"{ENGINE}/test_buckets.py",), ("tests/pretrain/test_ranks.py",)),
    "gradients": Room(
        ("pretrain/engine/gradients.py",), (f"{ENGINE}/test_gradients.py",),
        ("tests/pretrain/test_ranks.py", "tests/pretrain/test_pipeline.py", "tests/parallel/test_layouts.py"),
    ),
    "grad_norm": Room(
        ("pretrain/engine/grad_norm.py",), (f"{ENGINE}/test_grad_norm.py", "tests/pretrain/test_ranks.py", f"{ENGINE}/test_offload.py"),
        ("tests/pretrain/test_pipeline.py", "tests/parallel/test_layouts.py"),
    ),
    "step_sums": Room(
        ("pretrain/step_sums.py",), ("tests/pretrain/test_step_sums.py",),
        ("tests/pretrain/test_train.py", "tests/pretrain/test_pipeline.py"),
    ),
    "context": Room(
        ("model/parallel/context.py",), ("tests/model/parallel/test_context.py",),
        ("tests/model/parallel/test_context.py", "tests/model/mixers/test_mixers.py", *SLOW),
    ),
    "dispatch": Room(
        ("model/moe/dispatch.py", "model/moe/by_rank.py", "model/moe/dispatch.py", "model/moe/transfer.py"),
        ("tests/model/moe/test_dispatch.py",), ("tests/model/moe", "tests/examples/simulate/test_trace.py"),
    ),
    "corruption": Room(
        ("pretrain/hooks/state_watch.py",), ("tests/pretrain/hooks/test_state_watch.py",),
        ("tests/pretrain/hooks/test_state_watch.py", *SLOW),
    ),
    "verify": Room(
        ("pretrain/export/verify.py",), ("tests/pretrain/export/test_verify.py",),
        ("tests/pretrain/export/test_export.py",),
    ),
    "plan_memory": Room(
        ("launch/plan/memory.py",), ("tests/launch/plan/test_memory.py",),
        ("tests/launch/plan/test_plan.py", "tests/launch/plan/test_search.py"),
    ),
}  # fmt: skip
