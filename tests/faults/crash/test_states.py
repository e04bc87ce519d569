"""Every state in which a crash may leave the disk is one from which work continues, with nothing lost that was
durable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.durable.json_files import read_lines
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.node_cache import BlockCache, CacheSettings
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.verify import verify_store
from amfm.pretrain.checkpoint.files import verify_checkpoint
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints, newest_saved_step
from amfm.pretrain.launcher_protocol import DONE, NEXT_LAYOUT
from amfm.pretrain.monitor.metrics import keep_until
from tests.faults.crash.states import CrashState, Operation, crash_states, read_record
from tests.faults.disk import with_record
from tests.faults.staged import BOUNDARY, run_to_the_end, staged_config
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tiny_store import run_in_process
from tests.pretrain.tiny_run import read_metrics


def record_child(place: Path, *arguments: str) -> Path:
    place.mkdir(exist_ok=True)
    environment = with_record(place / "record", place / "watched")
    command = [sys.executable, "-m", "tests.faults.crash.record_child", str(place), *arguments]
    subprocess.run(command, env=environment, check=True, timeout=PATIENCE_SECONDS)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_child(tmp_path_factory.mktemp("crash"))


def read_operations(place: Path, name: str) -> list[Operation]:
    return read_record((place / f"{name}.record").read_bytes(), place / "watched" / name)


def states_of(place: Path, name: str) -> Iterator[CrashState]:
    return crash_states(place / "initial" / name, read_operations(place, name))


def report(capsys: pytest.CaptureFixture[str], name: str, survived: int) -> None:
    with capsys.disabled():
        print(f"\n{name}: {survived} states after a crash, all survived")


def sound_steps(folder: Path) -> dict[int, str]:
    found = {}
    for path in list_checkpoints(folder):
        manifest, problems = verify_checkpoint(path)
        if manifest is not None and not problems:
            found[manifest["step"]] = manifest["saved_at"]
    return found


@pytest.mark.parametrize(("name", "newest_before"), [("save", 2), ("replace", 3)])
def test_after_a_crash_in_a_save_the_newest_sound_checkpoint_is_the_old_or_the_new_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, newest_before: int
) -> None:
    survived = 0
    for state in states_of(place, name):
        newest = max(sound_steps(state.write(tmp_path / "state")), default=-1)
        assert newest in (newest_before, 3), (state.after, sorted(state.files))
        assert state.after < state.total or newest == 3, "what a save says is durable, is"
        survived += 1
    assert survived > 30
    report(capsys, name, survived)


@pytest.mark.slow
def test_after_a_crash_in_prepare_the_store_is_the_old_or_the_new_one_and_prepare_goes_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = TokenStore.open(place / "initial" / "prepare").identity()
    new = TokenStore.open(place / "watched" / "prepare").identity()
    config = DataConfig.model_validate(json.loads((place / "data.json").read_text()))
    config = config.model_copy(update={"store": str(tmp_path / "state")})
    survived = 0
    operations = read_operations(place, "prepare")
    for state in crash_states(place / "initial" / "prepare", operations, max_pending=2, each_file=False):
        folder = state.write(tmp_path / "state")
        assert verify_store(folder) == [], (state.after, sorted(state.files))
        assert TokenStore.open(folder).identity() in (old, new)
        if survived % 100 == 0 or state.after == state.total:
            assert prepare(config, runner=run_in_process).identity == new
            assert verify_store(folder) == []
            assert not list(folder.rglob(".writing-*"))
        survived += 1
    assert survived > 100
    report(capsys, "prepare", survived)


def test_after_a_crash_the_lines_of_metrics_are_whole_and_those_of_a_checkpoint_are_there(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operations = read_operations(place, "metrics")
    # The second line is of step 4; a checkpoint of it would be begun after the sync of both files.
    synced = [number for number, item in enumerate(operations) if item.kind == "s" and item.path == "metrics.jsonl"]
    survived = 0
    for state in states_of(place, "metrics"):
        folder = state.write(tmp_path / "state")
        resumed = 4 if state.after > synced[0] else 2
        keep_until(folder / "metrics.jsonl", resumed)
        steps = [record["step"] for _, record in read_lines(folder / "metrics.jsonl") if record is not None]
        assert steps == list(range(1, resumed + 1)), (state.after, steps)
        survived += 1
    report(capsys, "metrics", survived)


def test_after_a_crash_a_block_of_the_node_cache_is_whole_or_fetched_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    survived = 0
    for state in states_of(place, "cache"):
        folder = state.write(tmp_path / "state")
        cache = BlockCache(CacheSettings(str(folder), 10**6, 4096))
        for name in ("aa11", "aa22"):
            descriptor = cache._open_checked(cache._path(name), name)
            if descriptor is not None:
                assert os.pread(descriptor, 4000, 0) == name.encode() * 1000, state.after
                os.close(descriptor)
        survived += 1
    report(capsys, "node cache", survived)


@pytest.mark.slow
def test_after_a_crash_where_another_layout_begins_the_run_goes_on_in_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the save before the boundary over exit code 4 and the new start to the save after it, the whole run directory."""
    place = record_child(tmp_path / "crash", "stages")
    data = DataConfig.model_validate_json((place / "data.json").read_text())
    assert run_to_the_end(staged_config(data, tmp_path / "straight")) == [NEXT_LAYOUT, DONE]
    straight = [line["loss"] for line in read_metrics(tmp_path / "straight")]
    survived, resumed, tried = 0, 0, -1
    operations = read_operations(place, "stages")
    for state in crash_states(place / "initial" / "stages", operations, max_pending=3, each_file=False):
        folder = state.write(tmp_path / "state")
        sound = sound_steps(folder / "checkpoints")
        newest = max(sound, default=-1)
        assert newest >= BOUNDARY - 1, (state.after, sorted(state.files))
        assert state.after < state.total or newest == BOUNDARY + 1, "what the run says is saved, is"
        # The launcher chooses ranks and layout only by the name, so no checkpoint by name may be less than whole.
        assert newest_saved_step(folder) == newest, (state.after, sorted(state.files))
        lines = [line["step"] for _, line in read_lines(folder / "metrics.jsonl") if line is not None]
        assert lines[:newest] == list(range(1, newest + 1)), (state.after, newest, lines)
        if state.after >= tried + len(operations) // 12:
            tried, resumed = state.after, resumed + 1
            codes = run_to_the_end(staged_config(data, folder))
            assert codes == ([NEXT_LAYOUT, DONE] if newest <= BOUNDARY - 1 else [DONE]), (state.after, codes)
            assert [line["loss"] for line in read_metrics(folder)] == straight, state.after
        survived += 1
    assert survived > 100 and resumed > 5
    report(capsys, f"stage boundary ({resumed} of them trained to the end)", survived)
