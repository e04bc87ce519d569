"""What plug-ins, libraries and the system do to a rank under way: it ends with a code that is right, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, RUN_FAILED
from amfm.pretrain.train import train
from tests.faults import inject
from tests.faults.attempt import Attempt
from tests.faults.disk import ROOT
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import read_metrics, tiny_config, tiny_data

SETTINGS: dict[str, Any] = {
    "model__pattern": "E-",
    "train__steps": 6,
    "train__checkpoint_every_steps": 2,
    "launch__heartbeat_seconds": 6,
}
HURT_AFTER = 3
FAILED, ABORTED = (RUN_FAILED,), (-signal.SIGABRT,)
# By the fault: the codes that may follow, and what is said where Python still speaks.
ENDED = {
    "exit_in_order": (FAILED, "sys.exit(0) was called at "),
    "hold_python": (ABORTED, ""),
    # Which library meets its closed file first is not ours to say: Python raises, gloo's thread aborts.
    "close_descriptors": (FAILED + ABORTED, "Bad file descriptor"),
    "lower_descriptors": (FAILED, ""),  # no file to write its words to
    "lower_memory": (FAILED, "can't allocate memory"),
    "move_away": (FAILED, "is not the folder any more that this run writes to"),
    "remove_gradients": (FAILED, "does not require grad"),
}
STORE = {
    "train__steps": 30,
    "train__checkpoint_every_steps": 10,
}  # its end validates, with parts that were not read before


def put_back(run_dir: Path) -> None:
    """What a fault moved away."""
    moved = run_dir.with_name("moved")
    if moved.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        moved.rename(run_dir)


def attempt(data: DataConfig, run_dir: Path, settings: dict[str, Any], fault: str | None, *, ranks: int = 1) -> Any:
    """Codes and words of one start, whose last rank meets a fault."""

    def prepare(rank: int) -> None:
        if fault is not None and rank == ranks - 1:
            inject.after_step(HURT_AFTER, getattr(inject, fault))

    start = Attempt(data, run_dir, {**SETTINGS, **settings}, ranks, prepare=prepare)
    run_dir.mkdir(exist_ok=True)
    start.start()
    codes = start.finish()
    said = " ".join(path.read_text() for path in sorted(run_dir.glob("error-*.txt")))
    for path in run_dir.glob("error-*.txt"):
        path.unlink()
    return codes, said


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir)]


def meet_all(place: str, names: list[str]) -> dict[str, Any]:
    """Each fault in its own run: how it ended, and whether the next start gave the losses of a run without any."""
    data = tiny_data(Path(place, "data"))
    assert attempt(data, Path(place, "straight"), {}, None)[0] == [DONE]
    results = {}
    for name in names:
        run_dir = Path(place, name)
        ended = attempt(data, run_dir, {}, name)
        put_back(run_dir)
        again = attempt(data, run_dir, {}, None)
        results[name] = (ended, again, losses_of(run_dir) == losses_of(Path(place, "straight")))
    return results


def check_met(place: Path, names: list[str]) -> None:
    (results,) = run_ranks(meet_all, str(place), names, num_ranks=1)
    for name in names:
        ((code,), said), again, is_same = results[name]
        allowed, words = ENDED[name]
        assert code in allowed and (code != RUN_FAILED or words in said), (name, code, said)
        assert again == ([DONE], "") and is_same, (name, again)


def test_a_hook_that_keeps_python_waiting_is_ended_and_nothing_is_lost(tmp_path: Path) -> None:
    check_met(tmp_path, ["hold_python"])


@pytest.mark.slow
def test_what_ends_a_rank_ends_it_with_the_right_code_and_loses_nothing(tmp_path: Path) -> None:
    check_met(tmp_path, [name for name in ENDED if name != "hold_python"])


def meet_harmless(place: str) -> dict[str, Any]:
    data = tiny_data(Path(place, "data"))
    found = {}
    for name in (None, "change_defaults", "spoil_one_expert"):
        run_dir = Path(place, str(name))
        found[str(name)] = (attempt(data, run_dir, {}, name), losses_of(run_dir), skipped_of(run_dir))
    settings = {"train__precision": "bf16", "train__max_skipped_steps": 2}
    found["bf16"] = (attempt(data, Path(place, "bf16"), settings, None), losses_of(Path(place, "bf16")), [])
    run_dir = Path(place, "overflow")
    ended = attempt(data, run_dir, settings, "overflow")
    found["overflow"] = (ended, losses_of(run_dir), skipped_of(run_dir))
    found["overflow again"] = (attempt(data, run_dir, settings, None), losses_of(run_dir), skipped_of(run_dir))
    return found


def skipped_of(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir) if line["skipped"]]


@pytest.mark.slow
def test_numbers_that_overflow_are_skipped_and_changed_defaults_change_nothing(tmp_path: Path) -> None:
    """One expert of one block with a NaN skips only its step; a model that stays beyond bfloat16 stops the run."""
    (found,) = run_ranks(meet_harmless, str(tmp_path), num_ranks=1)
    straight = found["None"][1]
    assert found["change_defaults"] == (([DONE], ""), straight, [])
    ended, losses, skipped = found["spoil_one_expert"]
    assert ended == ([DONE], "") and skipped == [HURT_AFTER + 1]
    assert losses[: HURT_AFTER + 1] == straight[: HURT_AFTER + 1] and losses[-1] != straight[-1]
    (codes, _), losses, skipped = found["overflow"]
    assert codes == [RUN_FAILED] and skipped == [4, 5, 6][: len(skipped)] and losses[:3] == found["bf16"][1][:3]
    (codes, said), losses, skipped = found["overflow again"]
    assert (codes, said) == ([DONE], "") and None not in losses[-2:], "its master weights were never wrong"


def meet_other_stores(place: str) -> dict[str, Any]:
    found = {}
    for name in ("replace_store", "remove_store"):
        folder = Path(place, name)
        data = tiny_data(folder / "data")
        store = Path(data.store)
        make_tiny_store(folder / "other", num_documents=300, mean_words=14)
        (folder / "other" / store.name).rename(store.with_name("other"))
        straight = attempt(data, folder / "straight", STORE, None)
        ended = attempt(data, folder / "run", STORE, name)
        refused = attempt(data, folder / "run", STORE, None)
        if store.exists():
            shutil.rmtree(store)
        store.with_name("away").rename(store)
        again = attempt(data, folder / "run", STORE, None)
        found[name] = (straight, ended, refused, again, losses_of(folder / "run") == losses_of(folder / "straight"))
    return found


@pytest.mark.slow
def test_a_store_that_is_replaced_or_removed_under_a_run_ends_it_and_another_one_is_refused(tmp_path: Path) -> None:
    (found,) = run_ranks(meet_other_stores, str(tmp_path), num_ranks=1)
    for name, words in (("replace_store", "the manifest states"), ("remove_store", "is missing")):
        straight, (codes, said), (refused, why), again, is_same = found[name]
        assert straight == ([DONE], "")
        assert codes == [RUN_FAILED] and words in said, (name, said)
        assert refused == [BAD_INPUT] and ("tokenizer" in why or "must hold a prepared store" in why), (name, why)
        assert again == ([DONE], "") and is_same, name


@contextmanager
def groups_removed() -> Iterator[None]:
    """Afterwards the cgroups of `inject` are gone, whose processes are."""
    try:
        yield
    finally:
        for group in Path("/sys/fs/cgroup").glob("*/amfm-test-*"):
            with suppress(OSError):
                group.rmdir()


def skip_without_group(controller: str) -> None:
    try:
        inject.limited_group(controller, "try", 1 << 20).rmdir()
    except OSError as error:
        pytest.skip(f"NOT TESTED: no {controller} cgroup can be made here: {error}")


def run_out(place: str, settings: dict[str, Any], fault: str, ranks: int) -> Any:
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    data = tiny_data(Path(place, "data"))
    ended = attempt(data, Path(place, "run"), settings, fault, ranks=ranks)
    again = attempt(data, Path(place, "run"), settings, None, ranks=ranks)
    straight = attempt(data, Path(place, "straight"), settings, None, ranks=ranks)
    return ended, again, straight, losses_of(Path(place, "run")) == losses_of(Path(place, "straight"))


@pytest.mark.slow
def test_a_rank_that_the_kernel_kills_for_memory_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    """By a cgroup, as in a job with a limit."""
    skip_without_group("memory")
    with groups_removed():
        (found,) = run_ranks(
            run_out, str(tmp_path), {"train__micro_batch_size": 1}, "run_out_of_memory", 2, num_ranks=1
        )
    (ended, said), again, straight, is_same = found
    assert ended == [RUN_FAILED, -signal.SIGKILL] and "rank 1 on " in said
    assert again == straight == ([DONE] * 2, "") and is_same


@pytest.mark.slow
def test_a_rank_that_gets_no_further_thread_ends_in_words_and_nothing_is_lost(tmp_path: Path) -> None:
    """By a cgroup: what starts a process or a thread afterwards is rejected, and the save after it."""
    skip_without_group("pids")
    with groups_removed():
        (found,) = run_ranks(run_out, str(tmp_path), {}, "run_out_of_threads", 1, num_ranks=1)
    (ended, said), again, straight, is_same = found
    assert ended == [RUN_FAILED] and "the system allows no further process or thread here" in said
    assert again == straight == ([DONE], "") and is_same


NO_SHARED_MEMORY = (
    "mount --bind {empty} /dev/shm && mount -o remount,bind,ro /dev/shm && "
    "mount --bind {root} {root} && mount -o remount,bind,ro {root} && exec {python} -m tests.faults.storage_child {place}"
)


@pytest.mark.slow
def test_a_run_needs_no_shared_memory_and_writes_nothing_beside_its_package(tmp_path: Path) -> None:
    """In a mount namespace in which /dev/shm and this clone are read-only, on two ranks that share a board."""
    (tmp_path / "empty").mkdir()
    runs = {name: {"run": name, "settings": {}, "ranks": 1} for name in ("apart",)}
    jobs = {"data": tiny_data(tmp_path / "data").model_dump(mode="json"), "runs": runs}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    words = {"empty": tmp_path / "empty", "root": ROOT, "python": sys.executable, "place": tmp_path}
    script = NO_SHARED_MEMORY.format(**words)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"NOT TESTED: no mount namespace can be made here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["apart"] == {"codes": [DONE], "said": [""]}
    assert len(read_metrics(tmp_path / "apart")) == 4


def count_what_stays(place: str, steps: int) -> list[dict[str, int]]:
    """Memory that is not of files, descriptors, threads and processes of a run, each hundred steps, in this process."""
    data = tiny_data(Path(place, "data"))
    seen: list[dict[str, int]] = []

    def look(run: Any) -> None:
        process = psutil.Process()
        anonymous = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert anonymous is not None
        here = {"bytes": int(anonymous[1]) << 10, "files": process.num_fds(), "threads": process.num_threads()}
        seen.append(here | {"processes": len(process.children(recursive=True))})

    for step in range(100, steps + 1, 100):
        inject.after_step(step, look)
    settings = {
        **{"train__steps": steps, "train__checkpoint_every_steps": 50, "train__validate_every_steps": 50},
        **{"health__check_state_every_steps": 50, "data__num_workers": 1, "run__tensorboard": True},
    }
    config = tiny_config(data, Path(place, "run"), **settings)
    assert train(config) == DONE
    return seen


@pytest.mark.slow
def test_two_thousand_steps_leave_no_memory_descriptors_threads_or_processes(tmp_path: Path) -> None:
    (seen,) = run_ranks(count_what_stays, str(tmp_path), 2000, num_ranks=1)
    # What a save that is still being written holds goes again: the least of the last looks is what stays.
    last = {kind: min(here[kind] for here in seen[-5:]) for kind in seen[0]}
    for kind in ("files", "threads", "processes"):
        assert last[kind] <= max(here[kind] for here in seen[:5]), (kind, seen)
    assert last["bytes"] - seen[2]["bytes"] < 32 << 20, seen
