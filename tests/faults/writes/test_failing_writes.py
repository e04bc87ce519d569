"""A disk that is full, broken or interrupted at any write of a verb: code 3 with the path, OUT absent, and again is equal."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from amfm_foreign_states.dcp import export_dcp

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.launcher_protocol import RUN_FAILED
from amfm.pretrain.train import train
from tests.faults.crash.states import NAMES, Operation, read_record
from tests.faults.disk import fault, with_faults, with_record
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import tiny_config

RULES = 15  # disk.c knows 16
# What names the folder, follows the order of work, or carries a random number of torch's.
NOT_COMPARED = {"README.md", "journal.jsonl", ".lock", "config.yaml", ".metadata"}
VERBS = ("export", "dcp", "universal", "import", "state", "merge", "tokens", "prepare", "train")
STAYING = ("prepare", "train", "tokens")  # which continue in a folder where they left off

Case = tuple[str, str, str, int]  # verb, operation, error, calls that pass before it


def write_text(place: Path) -> None:
    """Text for a preparation."""
    (place / "config.json").write_text(make_tiny_store(place / "text", num_documents=60).model_dump_json())


@pytest.fixture(scope="module")
def place(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, an export of it, and text: what the verbs read."""
    place = tmp_path_factory.mktemp("writes")
    assert train(tiny_config(data, place / "run", train__stop_after_steps=1)) == 0
    export_checkpoint(place / "run", place / "exported", verify=False)
    export_dcp(place / "run", place / "state")
    write_text(place)
    (place / "store").symlink_to(data.store)
    return place


def digests(folder: Path) -> dict[str, str]:
    of_run = (folder / "checkpoints").is_dir()  # whose metrics and events have times in them
    files = [path for path in folder.rglob("*.safetensors" if of_run else "*") if path.is_file()]
    files = [path for path in files if path.name not in NOT_COMPARED]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def clear(place: Path) -> None:
    """Delete what verbs wrote, in a test that failed too."""
    for path in place.glob("*out[0-9]*"):
        shutil.rmtree(path)


def check(place: Path, cases: list[Case]) -> int:
    """Let each verb meet its fault, after an undisturbed call of each; returns how many met one that is an error."""
    clear(place)
    verbs = sorted({case[0] for case in cases})
    jobs = [*verbs, *(case[0] for case in cases)]
    rules = []
    for number, (_, operation, error, after) in enumerate(cases, start=len(verbs)):
        rule = fault(operation, f"{place}/*out{number}[!0-9]*", error, after=after, when=place / f"{number}.on")
        rules.append(f"{rule} times=1" if error == "EINTR" else rule)
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.writes.child", str(place)]
    done = subprocess.run(command, env=with_faults(rules), check=True, stdout=subprocess.PIPE, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(jobs) and all(result["first"]["code"] == 0 for result in results[: len(verbs)])
    failed = 0
    for number, (case, result) in enumerate(zip(cases, results[len(verbs) :]), start=len(verbs)):
        verb, operation, error, _ = case
        if result["first"]["code"] == 0:
            assert result["again"] is None
        else:
            failed += 1
            assert error != "EINTR", ("what was interrupted is done again", case, result)
            assert result["first"]["code"] == RUN_FAILED and f"out{number}" in result["first"]["said"], (case, result)
            # A folder that cannot be opened cannot be cleared either: the next call does it.
            left = [name for name in result["left"] if operation != "open" or not name.startswith(".")]
            assert left in ([], [f"out{number}"] if verb in STAYING else []), (case, result)
            assert result["again"]["code"] == 0, (case, result)
        assert digests(place / f"out{number}") == digests(place / f"out{verbs.index(verb)}"), (case, result)
    assert list(place.glob(".out*")) == []
    return failed


def test_a_preparation_whose_write_fails_names_it_and_goes_on_to_the_same_store(tmp_path: Path) -> None:
    write_text(tmp_path)
    cases = [("write", "ENOSPC", 6), ("rename", "EIO", 1), ("fsync", "EIO", 20), ("write", "EINTR", 9)]
    assert check(tmp_path, [("prepare", *case) for case in cases]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EINTR"])
def test_every_write_of_every_verb_may_fail(place: Path, verb: str, error: str) -> None:
    operations = ["write"] if error == "EINTR" else ["write", "fsync", "rename", "mkdir", "open"]
    cases = [(verb, operation, error, after) for after in (0, 1, 2, 4, 9, 20, 45) for operation in operations]
    failed = sum(check(place, cases[start : start + RULES]) for start in range(0, len(cases), RULES))
    assert (failed == 0) == (error == "EINTR")


@pytest.mark.slow
@pytest.mark.parametrize("options", [("-OO",), ("-W", "error")], ids=" ".join)
def test_every_verb_writes_the_same_under_options_of_python(place: Path, options: tuple[str, ...]) -> None:
    (place / "jobs.json").write_text(json.dumps(VERBS))
    written = []
    for given in (("-W", "ignore"), options):
        clear(place)
        command = [sys.executable, *given, "-m", "tests.faults.writes.child", str(place)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        written.append([digests(place / f"out{number}") for number in range(len(VERBS))])
        assert [result["first"]["code"] for result in results] == [0] * len(VERBS), results
    assert written[0] == written[1]


def find_unsynced(operations: list[Operation], root: Path) -> list[str]:
    """What is published by a rename before the disk has it: content, names below it, and then the name itself.

    Names that are not there at the end are temporary ones of a library whose renames pass by disk.c.
    """
    dirty: set[str] = set()  # files with content, folders with names that the disk may not have
    faults, waiting = [], dict[str, str]()
    for operation in operations:
        path, source = operation.path, operation.path + "/"
        if operation.kind == "s":
            dirty.discard(path)
            waiting.pop(path, None)
        elif operation.kind in "wt":
            dirty.add(path)
        if operation.kind == "r":
            moved = [name for name in dirty if name == path or name.startswith(source)]
            there = [name for name in moved if (root / (operation.second + name.removeprefix(path))).exists()]
            faults += [f"{name} when {operation.second} appears" for name in there]
            dirty = {name for name in dirty if name != path and not name.startswith(source)}
            if not operation.second.rpartition("/")[2].startswith("."):
                waiting[operation.second.rpartition("/")[0]] = operation.second
        elif operation.kind in NAMES:
            dirty.add(operation.folder)
            if operation.kind in "ud":
                dirty.discard(path)
    return faults + [f"the name {name}" for name in waiting.values()]


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True], ids=["at once", "after one that failed"])
def test_what_a_rename_publishes_is_on_the_disk_before_and_its_name_after(place: Path, fails: bool) -> None:
    clear(place)
    (place / "jobs.json").write_text(json.dumps(VERBS))
    rules = [
        fault("fsync", f"{place}/*out{number}[!0-9]*", "EIO", after=1, when=place / f"{number}.on")
        for number in range(len(VERBS))
    ]
    variables = with_record(place / "record", place) | (with_faults(rules) if fails else {})
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.writes.child", str(place)]
    done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ends = [(result["first"]["code"], (result["again"] or {"code": 0})["code"]) for result in results]
    assert ends == [(RUN_FAILED if fails else 0, 0)] * len(VERBS), results
    operations = read_record((place / "record").read_bytes(), place)
    (place / "record").unlink()
    for number, verb in enumerate(VERBS):
        of_verb = [item for item in operations if f"out{number}" in item.path or (item.kind == "s" and not item.path)]
        assert sum(item.kind == "r" for item in of_verb) >= 1, verb
        # A heartbeat says that a rank lives, and is of no use after a loss of power.
        unsynced = [item for item in find_unsynced(of_verb, place) if "/heartbeats/" not in item]
        assert unsynced == [], verb
