"""Saving: all or nothing on every rank, old checkpoints survive, and only what may change changes on resume."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from amfm.pretrain.checkpoint.commit import is_marked, is_named, mark
from amfm.pretrain.checkpoint.compatibility import MAY_CHANGE, may_change
from amfm.pretrain.checkpoint.engine_layout import EngineLayout
from amfm.pretrain.checkpoint.inspect import (
    diff_checkpoints,
    find_checkpoint,
    inspect_checkpoint,
    read_full_state,
)
from amfm.pretrain.checkpoint.load import find_mismatches, list_warnings
from amfm.pretrain.checkpoint.manifest_file import EVERY, list_checkpoints, read_manifest
from amfm.pretrain.checkpoint.save import ranks_of
from amfm.pretrain.config.fields import flatten_settings
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.full_disk import largest_file
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import IDENTITIES, load, make_engine, run_steps, save, save_whole, toy_config

CHECKPOINTS_PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"
READ_ONLY = 1
REMOUNT = 32


@pytest.fixture(scope="module")
def engine() -> ZeroEngine:
    engine = make_engine(initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1))
    run_steps(engine, 0, 1)
    return engine


def test_other_versions_of_libraries_are_named(engine: ZeroEngine, tmp_path: Path) -> None:
    path = save(tmp_path, 1, engine)
    manifest = read_manifest(path)
    assert list_warnings(tmp_path, path, manifest, toy_config()) == []
    manifest["versions"]["torch"] = "1.0"
    (warning,) = list_warnings(tmp_path, path, manifest, toy_config())
    assert warning.startswith("saved with torch 1.0, this is 2")


def test_a_weight_of_another_shape_is_named(engine: ZeroEngine, tmp_path: Path) -> None:
    manifest = read_manifest(save(tmp_path, 1, engine))
    layout, ranks = EngineLayout.of(engine), ranks_of(engine)
    assert find_mismatches(manifest, layout, ranks) == []
    name = next(iter(manifest["parameters"]))
    manifest["parameters"][name]["shape"] = [1, 2, 3]
    (fault,) = find_mismatches(manifest, layout, ranks)
    assert fault.startswith(f"{name} has shape [") and fault.endswith("in the checkpoint [1, 2, 3]")


def test_a_checkpoint_stands_though_latest_cannot_be_written(engine: ZeroEngine, tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    saved = save_whole(tmp_path, 1, engine)
    assert inspect_checkpoint(saved.path)["ok"]
    assert any("latest stays as it was" in remark for remark in saved.remarks)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A tmpfs of this many bytes; needs root in a container that may mount."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    options = f"size={num_bytes}".encode()
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, options) != 0:
        pytest.skip(f"no tmpfs can be mounted here ({os.strerror(ctypes.get_errno())})")
    try:
        yield folder
    finally:
        libc.umount2(str(folder).encode(), 2)


def test_too_little_space_is_refused_before_writing(engine: ZeroEngine, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 600_000) as disk:
        with pytest.raises(RuntimeError) as caught:
            save(disk / "checkpoints", 1, engine)
        assert names(disk / "checkpoints") == []
    text = str(caught.value)
    assert f"not enough space in {disk / 'checkpoints'}" in text
    assert "bytes, " in text and "are free" in text and "was not saved" in text


def test_a_disk_that_fills_up_leaves_the_old_checkpoints(engine: ZeroEngine, tmp_path: Path) -> None:
    save(tmp_path, 1, engine)
    with largest_file(20_000), pytest.raises(RuntimeError, match=r"step 2 .* was not saved: rank 0: File too large"):
        save(tmp_path, 2, engine)
    assert names(tmp_path) == ["latest", "step-00000001"]
    loaded = load(tmp_path, engine)
    assert loaded is not None
    assert (loaded.step, loaded.skipped, loaded.warnings) == (1, (), ())


def test_a_read_only_run_directory_is_named(engine: ZeroEngine, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4_000_000) as disk:
        save(disk / "checkpoints", 1, engine)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", READ_ONLY | REMOUNT, None) == 0
        with pytest.raises(RuntimeError, match=r"Read-only file system \(.*disk/checkpoints"):
            save(disk / "checkpoints", 2, engine)
        loaded = load(disk / "checkpoints", engine)
        assert loaded is not None and loaded.step == 1


def test_a_file_in_place_of_the_folder_is_named(engine: ZeroEngine, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RuntimeError, match="File exists"):
        save(tmp_path / "checkpoints", 1, engine)


def test_a_state_with_nan_is_not_saved(engine: ZeroEngine, tmp_path: Path) -> None:
    save(tmp_path, 1, engine)
    broken = make_engine(initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1))
    with torch.no_grad():
        broken.module.expert_bias[1] = float("nan")
    with pytest.raises(RuntimeError, match="tensor buffer/expert_bias holds NaN or infinity"):
        save(tmp_path, 2, broken)
    assert names(tmp_path) == ["latest", "step-00000001"]


def fail_on_one_rank(folder: str) -> tuple[str, list[str], int]:
    """Rank 1's disk is full at the second save; the third works again."""
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    engine = make_engine(parallel, stage=3)
    save(Path(folder), 1, engine)
    try:
        with largest_file(10_000 if parallel.rank == 1 else 1 << 30):
            save(Path(folder), 2, engine)
        text = "saved"
    except RuntimeError as error:
        text = str(error)
    left = names(Path(folder))
    parallel.gather_objects(None)
    save(Path(folder), 3, engine)
    loaded = load(Path(folder), engine)
    assert loaded is not None
    return text, left, loaded.step


def test_all_ranks_report_the_failure_of_one(tmp_path: Path) -> None:
    for text, left, step in run_ranks(fail_on_one_rank, str(tmp_path), num_ranks=2):
        place = tmp_path / "step-00000002.tmp" / "rank-00001.safetensors"
        assert text == f"checkpoint of step 2 in {tmp_path} was not saved: rank 1: File too large ({place})"
        assert left == ["latest", "step-00000001"]
        assert step == 3


def test_the_last_ones_are_kept_and_broken_ones_do_not_count(engine: ZeroEngine, tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step, engine, keep_last=2)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000004"]
    (tmp_path / "step-00000004" / "rank-00000.safetensors").write_bytes(b"")
    (tmp_path / "step-00000006.tmp").mkdir()
    save(tmp_path, 5, engine, keep_last=2)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000004", "step-00000005"]


def test_marked_checkpoints_stay_and_do_not_count(engine: ZeroEngine, tmp_path: Path) -> None:
    steps = {"train__checkpoint_every_steps": 1, "train__keep_every_steps": 3}
    for step in range(1, 7):
        save(tmp_path, step, engine, keep_last=2, **steps)
        if step == 2:
            (tmp_path / "step-00000002" / "keep").write_text("the one of the paper")
    kept = [f"step-{step:08d}" for step in (2, 3, 4, 5, 6)]
    assert names(tmp_path) == ["latest", *kept]
    assert [inspect_checkpoint(tmp_path / name)["marked"] for name in kept] == [True, True, False, False, True]
    save(tmp_path, 6, engine, keep_last=2)  # rewritten without the setting: the mark stays
    assert (
        inspect_checkpoint(tmp_path / kept[-1])["marked"] and inspect_checkpoint(tmp_path / kept[-1])["warnings"] == []
    )


def test_a_damaged_checkpoint_that_someone_marked_stays_under_another_name_when_its_step_is_saved_again(
    engine: ZeroEngine, tmp_path: Path
) -> None:
    path = save(tmp_path, 2, engine)
    for number in (1, 2):
        mark(path)
        shard = path / "rank-00000.safetensors"
        shard.write_bytes(bytes([number]) * shard.stat().st_size)
        save(tmp_path, 2, engine)
        assert inspect_checkpoint(path)["ok"] and inspect_checkpoint(path)["marked"]
        before = tmp_path / f"{path.name}.replaced-{number}"
        assert (before / shard.name).read_bytes()[:1] == bytes([number])
    mark(path, EVERY)  # a setting's
    save(tmp_path, 2, engine)
    assert is_marked(path) and not is_named(path)
    assert names(tmp_path) == ["latest", path.name, f"{path.name}.replaced-1", f"{path.name}.replaced-2"]


def test_saving_a_step_again_replaces_it(engine: ZeroEngine, tmp_path: Path) -> None:
    save(tmp_path, 1, engine)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    save(tmp_path, 1, engine)
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert inspect_checkpoint(tmp_path / "step-00000001")["ok"]


def test_a_replaced_checkpoint_loads_until_its_successor_stands(engine: ZeroEngine, tmp_path: Path) -> None:
    save(tmp_path, 1, engine)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.old")
    loaded = load(tmp_path, engine)
    assert loaded is not None and loaded.path.name == "step-00000001.old"
    save(tmp_path, 1, engine)
    assert names(tmp_path) == ["latest", "step-00000001"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model__norm_epsilon": 1e-6}, "model.norm_epsilon: the checkpoint has 1e-05, this run has 1e-06"),
        ({"train__seed": 4}, "train.seed: the checkpoint has 0, this run has 4"),
        ({"train__global_batch_size": 4}, "train.global_batch_size: the checkpoint has 2, this run has 4"),
        ({"train__sequence_length": 16}, "train.sequence_length: the checkpoint has 8, this run has 16"),
        ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate: the checkpoint has 0.01, this run has 0.5"),
        ({"schedule__kind": "cosine"}, "schedule.kind: the checkpoint has 'wsd', this run has 'cosine'"),
        (
            {"identities": {**IDENTITIES, "tokenizer": "xyz"}},
            "tokenizer: the checkpoint has tttttttt, this run has xyz",
        ),
        ({"identities": {"dataset": "d" * 8}}, "tokenizer: the checkpoint has tttttttt, this run has None"),
    ],
)
def test_another_run_is_refused_naming_both_values(
    engine: ZeroEngine, tmp_path: Path, change: dict[str, object], text: str
) -> None:
    save(tmp_path, 1, engine)
    with pytest.raises(ValueError, match="cannot resume step 1") as caught:
        load(tmp_path, engine, **change)  # type: ignore[arg-type]
    assert text in str(caught.value)
    assert "give run.dir another name" in str(caught.value)


def test_a_checkpoint_moved_away_behind_a_link_is_left_alone(engine: ZeroEngine, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1, engine, keep_last=1)
    shutil.move(folder / "step-00000001", tmp_path / "archive")
    (folder / "step-00000001").symlink_to(tmp_path / "archive")
    for step in (2, 3):
        save(folder, step, engine, keep_last=1)
    assert names(folder) == ["latest", "step-00000001", "step-00000003"]
    assert inspect_checkpoint(tmp_path / "archive")["ok"]


def test_what_cannot_be_cleared_away_is_a_remark_and_saving_goes_on(engine: ZeroEngine, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with small_disk(folder / "step-00000001.tmp", 100_000), small_disk(folder / "step-00000002.tmp", 100_000):
        # A mounted folder can be neither removed nor renamed, by no one.
        first = save_whole(folder, 1, engine, keep_last=1)
        second = save_whole(folder, 2, engine, keep_last=1)
        assert any("step-00000001.tmp cannot be deleted" in remark for remark in first.remarks)
        assert any("step-00000002.tmp cannot be deleted" in remark for remark in second.remarks)
        loaded = load(folder, engine)
        assert loaded is not None and loaded.step == 2
        assert [path.name for path in list_checkpoints(folder)] == ["step-00000002"]
    save(folder, 3, engine, keep_last=1)
    assert names(folder) == ["latest", "step-00000003"]


def test_harmless_changes_are_allowed_and_reported(engine: ZeroEngine, tmp_path: Path) -> None:
    save(tmp_path, 1, engine)
    changes = {"run__dir": "moved", "train__steps": 20, "train__stop_after_steps": 5, "parallel__zero_stage": 3}
    loaded = load(tmp_path, engine, train__precision="float32", **changes)
    assert loaded is not None
    assert loaded.changes == (
        "parallel.zero_stage: 1 -> 3",
        "run.dir: 'unused' -> 'moved'",
        "train.precision: 'bf16' -> 'float32'",
        "train.steps: 10000 -> 20",
        "train.stop_after_steps: None -> 5",
    )


def test_every_allowed_name_exists_and_is_documented_and_the_text_is_guarded() -> None:
    documented = set(re.findall(r"`([a-z_.*]+)`", CHECKPOINTS_PAGE.read_text(encoding="utf-8")))
    known = set(flatten_settings(toy_config().model_dump(mode="json")))
    for allowed in MAY_CHANGE:
        stem = allowed.removesuffix(".*")
        assert any(name == stem or name.startswith(stem + ".") for name in known), allowed
        assert documented & {allowed, stem, stem.removeprefix("train.")}, (
            f"docs/checkpoints.md does not say why {allowed}"
        )
    assert may_change("data.sources.0.paths") and may_change("data.cache.folder"), "the data state guards the text"
    assert not may_change("model.pattern") and not may_change("data.packing")


def test_another_model_is_named_tensor_by_tensor(tmp_path: Path) -> None:
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    save(tmp_path, 1, make_engine(parallel))
    other = make_engine(parallel, extra=True)
    with pytest.raises(RuntimeError) as caught:
        load(tmp_path, other)
    text = str(caught.value)
    assert "does not fit this model" in text
    assert "extra.weight is in the model but not in the checkpoint" in text
    save(tmp_path / "other", 1, other)
    with pytest.raises(RuntimeError, match=r"extra.weight is in the checkpoint but not in the model"):
        load(tmp_path / "other", make_engine(parallel))


def test_full_state_fills_a_plain_module(engine: ZeroEngine, tmp_path: Path) -> None:
    save(tmp_path, 1, engine)
    state = read_full_state(find_checkpoint(tmp_path))
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    expected = engine.module.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_inspect_and_diff_tell_what_is_inside(engine: ZeroEngine, tmp_path: Path) -> None:
    first = save(tmp_path, 1, engine)
    found = inspect_checkpoint(first)
    assert (found["kind"], found["ok"], found["step"], found["problems"]) == ("checkpoint", True, 1, [])
    total = sum(parameter.numel() for parameter in engine.module.parameters())
    assert found["parameters"]["total"] == total == sum(found["parameters"]["by_group"].values())
    assert set(found["parameters"]["by_group"]) == {"decay", "no_decay"}
    assert found["bytes"] > 3 * 4 * total
    assert diff_checkpoints(first, first)["same"]
    run_steps(engine, 1, 2)
    second = save(tmp_path, 2, engine, run__dir="moved")
    difference = diff_checkpoints(first, second)
    assert difference["same"] is False and difference["steps"] == [1, 2]
    assert difference["settings"] == {"run.dir": ["unused", "moved"]}
    assert difference["state"]["cursor"] == [1, 2]
    assert difference["tensors"]["down.weight"]["weight"] > 0 and difference["tensors"]["down.weight"]["exp_avg"] > 0
    assert set(difference["tensors"]["expert_bias"]) == {"buffer"}


def test_listing_is_newest_first(tmp_path: Path) -> None:
    for name in ("step-00000009", "step-00000010", "step-00000010.old", "step-00000011.tmp", "step-1", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000012").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000010.old", "step-00000009"]
