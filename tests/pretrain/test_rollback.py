"""Going back on purpose: what is set aside, here, in a store and in memory, and what comes back; and forks.

A fork continues from a checkpoint as the run itself would, and with other settings where a resume allows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.store import object_store
from amfm.data_pipeline.store.object_store import RemoteFolder
from amfm.launch.cli import run as run_cli
from amfm.pretrain.checkpoint.commit import is_marked
from amfm.pretrain.checkpoint.manifest_file import (
    NO_DIGEST,
    checkpoint_name,
    continued_step,
    encode_manifest,
    list_checkpoints,
    read_manifest,
)
from amfm.pretrain.checkpoint.remote import RemoteCheckpoints
from amfm.pretrain.config.file import load_config
from amfm.pretrain.report.data import read_run
from amfm.pretrain.rollback import list_rollbacks, roll_back, roll_forward
from amfm.pretrain.train import train
from tests.helpers.json_output import one_object
from tests.helpers.s3 import BUCKET, s3_server
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.replicas.test_replicas import die_before_step, start
from tests.pretrain.checkpoint.replicas.test_replicas import settings as with_replicas
from tests.pretrain.checkpoint.test_remote import save_by_hand
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with s3_server() as (variables, _), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def url(server: None, tmp_path: Path) -> str:
    return f"s3://{BUCKET}/rollback/{tmp_path.name}"


def settings(**others: Any) -> dict[str, Any]:
    return {
        "model__pattern": "E-",
        "train__steps": 6,
        "train__checkpoint_every_steps": 2,
        "train__keep_last": 2,
        **others,
    }


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run_dir)}


STEPS_2, STEPS_4, STEPS_6 = (f"step-{step:08d}" for step in (2, 4, 6))


def test_what_follows_a_rollback_is_set_aside_here_and_in_the_store_and_comes_back(
    data: DataConfig, tmp_path: Path, url: str
) -> None:
    run_dir, store = tmp_path / "run", RemoteCheckpoints(url)
    with_store = settings(train__checkpoint_store=url)
    assert train(tiny_config(data, run_dir, **with_store, train__stop_after_steps=4)) == 0
    before = losses(run_dir)
    made = roll_back(run_dir, 2, store, by="a test")
    assert (made.number, made.steps, list(losses(run_dir))) == (1, (4,), [1, 2])
    aside = run_dir / "checkpoints/rolled-back-1"
    assert names(aside) == [STEPS_4] == list(store.list_whole("rolled-back-1"))

    assert train(tiny_config(data, run_dir, **with_store)) == 0
    assert read_events(run_dir, "start")[-1]["resumed_from"] == STEPS_2 and not read_events(run_dir, "fetched")
    straight = losses(run_dir)
    assert {step: straight[step] for step in before} == before
    # keep_last is 2, and what was named is kept in addition to it; what was set aside is not pruned.
    assert names(run_dir / "checkpoints") == [STEPS_6, STEPS_4, STEPS_2] == list(store.list_whole())
    assert is_marked(run_dir / "checkpoints" / STEPS_2) and names(aside) == [STEPS_4]

    again = roll_forward(run_dir, 1, store)
    assert (again.number, again.steps) == (2, (4, 6)) and losses(run_dir) == before
    assert names(run_dir / "checkpoints") == [STEPS_4, STEPS_2] == list(store.list_whole())
    assert roll_forward(run_dir, 2, store).steps == (4,)
    assert losses(run_dir) == straight and list(store.list_whole()) == [STEPS_6, STEPS_4, STEPS_2]
    assert [each.number for each in list_rollbacks(run_dir, store)] == [3]
    words = [(event["event"], event["step"]) for event in read_events(run_dir) if event["event"].startswith("rolled_")]
    assert words == 2 * [("rolled_back_to", 2)] + [("rolled_forward", 4), ("rolled_back_to", 2), ("rolled_forward", 6)]


def test_a_setting_goes_back_once_and_fetches_what_only_the_store_has(
    data: DataConfig, tmp_path: Path, url: str
) -> None:
    run_dir = tmp_path / "run"
    with_store = settings(train__checkpoint_store=url)
    assert train(tiny_config(data, run_dir, **with_store, train__stop_after_steps=4)) == 0
    back = tiny_config(data, run_dir, **with_store, train__resume_step=2)
    (run_dir / "checkpoints" / STEPS_2).rename(tmp_path / "gone")
    assert continued_step(back) == 2
    for finished in (False, True):
        assert train(back) == 0
        starts = [event["resumed_from"] for event in read_events(run_dir, "start")]
        assert starts[1:] == [STEPS_2, *([STEPS_6] if finished else [])]
    assert [event["checkpoint"] for event in read_events(run_dir, "fetched")] == [STEPS_2]
    (event,) = read_events(run_dir, "rolled_back_to")
    assert (event["step"], event["steps"], event["by"]) == (2, [4], "train.resume_step")
    assert continued_step(back) == 6
    with pytest.raises(
        ValueError, match=r"train.resume_step=3: there is no checkpoint of step 3 in .* use one of 2, 4, 6"
    ):
        train(back.model_copy(update={"train": back.train.model_copy(update={"resume_step": 3})}))


@pytest.mark.slow
def test_a_store_that_was_rolled_back_stays_so_for_an_empty_run_directory(
    data: DataConfig, tmp_path: Path, url: str
) -> None:
    with_store = settings(train__checkpoint_store=url)
    assert train(tiny_config(data, tmp_path / "run", **with_store, train__stop_after_steps=4)) == 0
    roll_back(tmp_path / "run", 2, RemoteCheckpoints(url), by="a test")
    assert train(tiny_config(data, tmp_path / "run", **with_store)) == 0
    again = tiny_config(data, tmp_path / "other", **with_store, train__resume_step=2)
    assert train(again) == 0
    assert [event["resumed_from"] for event in read_events(tmp_path / "other", "start")] == [STEPS_6]


def run_with_replicas(data: DataConfig, place: Path) -> None:
    """A run that is killed after step 6, rolled back to step 4, and started again."""
    (place / "memory").mkdir()
    assert start(data, place / "run", with_replicas(place / "memory"), 1, partial(die_before_step, 6)) == [-9]
    roll_back(place / "run", 4, None, by="a test")
    assert start(data, place / "run", with_replicas(place / "memory"), 1) == [0]


@pytest.mark.slow
def test_a_replica_newer_than_the_rollback_is_set_aside(data: DataConfig, tmp_path: Path) -> None:
    run_ranks(run_with_replicas, data, tmp_path, num_ranks=1)
    assert [event["resumed_from"] for event in read_events(tmp_path / "run", "start")] == [None, STEPS_4]
    assert names(tmp_path / "run/checkpoints/rolled-back-1") == [STEPS_6]


def save_steps(run_dir: Path, *steps: int) -> Path:
    """Checkpoints without tensors of a model; returns their folder."""
    for step in steps:
        save_by_hand(run_dir / "checkpoints" / checkpoint_name(step), step)
    return run_dir / "checkpoints"


def test_what_cannot_be_gone_back_to_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    checkpoints = save_steps(tmp_path, 4, 6)
    with pytest.raises(ValueError, match=r"there is no checkpoint of step 5 in .*; use one of 4, 6"):
        roll_back(tmp_path, 5, None, by="a test")
    with pytest.raises(ValueError, match=r"rollback 1 of .* is not set aside; nothing is set aside"):
        roll_forward(tmp_path, 1, None)
    manifest = checkpoints / STEPS_4 / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content[:100])
    with pytest.raises(ValueError, match=r"the checkpoint of step 4 is damaged: .*; name another step"):
        roll_back(tmp_path, 4, None, by="a test")
    assert sorted(path.name for path in checkpoints.iterdir()) == [STEPS_4, STEPS_6]
    manifest.write_text(content)
    roll_back(tmp_path, 4, None, by="a test")
    other = {**read_manifest(checkpoints / STEPS_4), "versions": {"torch": "other"}, "sha256": NO_DIGEST}
    manifest.write_text(encode_manifest(other))
    with pytest.raises(ValueError, match=r"rollback 1 set aside what followed another checkpoint of step 4"):
        roll_forward(tmp_path, 1, None)
    assert names(checkpoints / "rolled-back-1") == [STEPS_6]


def test_a_checkpoint_behind_a_link_is_set_aside_as_a_link(tmp_path: Path) -> None:
    newest = save_steps(tmp_path / "run", 4, 6) / STEPS_6
    newest.rename(tmp_path / "moved")
    newest.symlink_to(Path("../../moved"))
    roll_back(tmp_path / "run", 4, None, by="a test")
    assert (tmp_path / "run/checkpoints/rolled-back-1" / STEPS_6).resolve() == tmp_path / "moved"
    roll_forward(tmp_path / "run", 1, None)
    assert newest.is_symlink() and newest.resolve() == tmp_path / "moved"


def test_an_object_larger_than_a_store_copies_at_once_comes_through_here(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "MAX_COPY_BYTES", 1000)
    folder = RemoteFolder(url)
    for size in (1000, 1001):
        folder.write("a/one", bytes(size))
        folder.copy("a/one", "b/one")
        assert folder.read("b/one") == bytes(size)


def read_losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir)]


def test_a_fork_trains_on_as_the_run_did_and_another_branch_as_it_is_told(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(tiny_config(data, run, **settings(train__steps=5, train__keep_last=3, schedule__warmup_steps=1))) == 0
    files = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    assert run_cli(["fork", str(run), str(tmp_path / "same"), "--step", "2"]) == 0
    assert f"amfm train {tmp_path}/same/config.yaml" in capsys.readouterr().out.replace("\n", "")
    assert train(load_config(tmp_path / "same/config.yaml")) == 0
    assert read_losses(tmp_path / "same") == read_losses(run), "bitwise"
    stages = "stages=[{name: stable, steps: 2}, {name: anneal, steps: 2, learning_rate: 1e-3}]"
    branch = [str(tmp_path / "branch"), "train.steps=null", stages, "train.checkpoint_every_steps=null"]
    capsys.readouterr()
    assert run_cli(["fork", str(run), *branch, "--step", "2", "--json"]) == 0
    changes = one_object(capsys.readouterr().out)["changes"]
    assert any(change.startswith("train.steps: 5 -> None") for change in changes)
    assert train(load_config(tmp_path / "branch/config.yaml")) == 0
    assert read_losses(tmp_path / "branch")[:2] == read_losses(run)[:2] and len(read_losses(tmp_path / "branch")) == 4
    assert read_losses(tmp_path / "branch")[3] != read_losses(run)[3]
    (event,) = read_events(tmp_path / "branch", "forked")
    assert event["step"] == 2 and event["source"] == str(run) and event["changes"] == changes
    assert [event["step"] for event in read_run(tmp_path / "branch").events if event["event"] == "start"] == [0, 2]
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == files


def test_what_cannot_be_forked_is_named_and_leaves_nothing(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(tiny_config(data, run, model__pattern="E-", train__steps=3, train__checkpoint_every_steps=2)) == 0
    for words, message in (
        (["--step", "1"], f"--step 1: {run} has checkpoints of steps 2, 3"),
        (["--step", "2", "optimizer.learning_rate=0.1"], "cannot resume step 2: optimizer.learning_rate"),
        (["--step", "2", "train.stop_after_steps=1"], "and the checkpoint has done 2"),
    ):
        assert run_cli(["fork", str(run), str(tmp_path / "out"), *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()
    assert run_cli(["fork", str(run), str(run), "--step", "2"]) == 2


def test_a_time_limit_saves_and_the_next_start_goes_on(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", model__pattern="E-", train__steps=4, train__stop_after_minutes=1e-6)
    assert train(config) == 0
    assert len(read_losses(tmp_path / "run")) == 2, "the step in which the time ran out, and the next"
    (event,) = read_events(tmp_path / "run", "time_limit")
    assert event["step"] == 1
    assert train(tiny_config(data, tmp_path / "run", model__pattern="E-", train__steps=4)) == 0
    assert train(tiny_config(data, tmp_path / "straight", model__pattern="E-", train__steps=4)) == 0
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "straight")


def test_steps_that_are_left_out_read_what_would_have_followed(data: DataConfig, tmp_path: Path) -> None:
    assert train(tiny_config(data, tmp_path / "plain", model__pattern="E-", train__steps=4)) == 0
    assert (
        train(tiny_config(data, tmp_path / "steps", model__pattern="E-", train__steps=4, data__skip_steps=[[2, 3]]))
        == 0
    )
    assert (
        train(tiny_config(data, tmp_path / "samples", model__pattern="E-", train__steps=4, data__skip=[[4, 12]])) == 0
    )
    plain, steps, samples = (read_losses(tmp_path / name) for name in ("plain", "steps", "samples"))
    assert steps == samples and steps[0] == plain[0] and steps[1] != plain[1]
