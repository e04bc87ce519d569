"""Checkpoints in an object store: sent in parts, committed by the manifest, fetched and verified, killed at every request."""

from __future__ import annotations

import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.store import from_url

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.store.object_store import PART_BYTES, RemoteFolder
from amfm.launch.inspect_path import mark_checkpoint
from amfm.pretrain.checkpoint.commit import is_marked, mark
from amfm.pretrain.checkpoint.files import make_place, write_tensors
from amfm.pretrain.checkpoint.inspect import inspect_checkpoint
from amfm.pretrain.checkpoint.manifest_file import (
    MAPPINGS,
    encode_manifest,
    list_checkpoints,
    rank_file_name,
    read_manifest,
)
from amfm.pretrain.checkpoint.remote import RemoteCheckpoints
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps, train
from tests.helpers.killing_proxy import Gate, killing_proxy
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.processes.zygote import call
from tests.helpers.s3 import BUCKET, s3_server
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config

ALONE = RankGroup(0, 1)


def send(checkpoint: str, place: str, endpoint: str) -> None:
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    sys.exit(bool(RemoteCheckpoints(place).push(Path(checkpoint), ALONE, 1)))


def send_aside(name: str, place: str, endpoint: str, names: list[str]) -> None:
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    sys.exit(bool(RemoteCheckpoints(place).rename(name, f"aside/{name}", names)))


def killed(gate: Gate, number: int, work: Callable[..., None], *arguments: Any) -> int:
    """Exit code of a process that works at an object store and is killed at its request of a given number."""
    with gate.lock:  # no request passes until it is known whom it kills
        process = call(work, *arguments)
        gate.count, gate.fatal, gate.victim = 0, number, process.pid
    return process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server() as (variables, _):
        variables |= {"HOME": str(tmp_path_factory.mktemp("home"))}
        with pytest.MonkeyPatch.context() as patch:  # only of these: what torch and DeepSpeed set meanwhile must stay
            for name, value in variables.items():
                patch.setenv(name, value)
            yield variables


@pytest.fixture
def url(server: dict[str, str], tmp_path: Path) -> str:
    return f"s3://{BUCKET}/runs/{tmp_path.name}"


def settings(url: str, **others: Any) -> dict[str, Any]:
    return {"model__pattern": "E-", "train__steps": 6, "train__checkpoint_every_steps": 2, "train__keep_last": 2} | {
        "train__checkpoint_store": url,
        **others,
    }


def test_a_run_goes_on_from_the_store_when_its_directory_is_lost(data: DataConfig, tmp_path: Path, url: str) -> None:
    assert train(tiny_config(data, tmp_path / "straight", model__pattern="E-", train__steps=6)) == 0
    assert train(tiny_config(data, tmp_path / "run", **settings(url, train__stop_after_steps=4))) == 0
    assert {name: len(objects) for name, objects in RemoteCheckpoints(url).list_objects().items()} == {
        "step-00000004": 2,
        "step-00000002": 2,
    }
    shutil.rmtree(tmp_path / "run")
    assert train(tiny_config(data, tmp_path / "run", **settings(url))) == 0
    assert [event["resumed_from"] for event in read_events(tmp_path / "run", "start")] == ["step-00000004"]
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("straight", "run")]
    assert losses[1] == losses[0][4:]
    (fetched,) = read_events(tmp_path / "run", "fetched")
    assert (fetched["checkpoint"], fetched["store"]) == ("step-00000004", url)
    assert list(RemoteCheckpoints(url).list_objects()) == ["step-00000006", "step-00000004"], "keep_last of them"
    assert not any(event.get("remarks") for event in read_events(tmp_path / "run", "checkpoint"))


@pytest.mark.slow
def test_a_step_that_someone_moved_aside_is_not_fetched_back(data: DataConfig, tmp_path: Path, url: str) -> None:
    assert train(tiny_config(data, tmp_path / "run", **settings(url, train__stop_after_steps=4))) == 0
    newest, older = list_checkpoints(tmp_path / "run/checkpoints")
    shutil.move(newest, tmp_path / "aside")
    with pytest.raises(ValueError, match=r"has step-00000004, which by .*events.jsonl was saved .* while step 2 is"):
        train(tiny_config(data, tmp_path / "run", **settings(url)))
    assert list_checkpoints(tmp_path / "run/checkpoints") == [older]
    assert list(RemoteCheckpoints(url).list_objects()) == ["step-00000004", "step-00000002"]


def test_damage_in_the_store_is_passed_over_and_never_begins_anew(data: DataConfig, tmp_path: Path, url: str) -> None:
    assert train(tiny_config(data, tmp_path / "run", **settings(url, train__stop_after_steps=4))) == 0
    shutil.rmtree(tmp_path / "run")
    client, name = from_url(url), "step-00000004/rank-00000.safetensors"
    content = bytearray(obstore.get(client, name).bytes())
    content[len(content) // 2] ^= 1
    obstore.put(client, name, bytes(content))
    assert train(tiny_config(data, tmp_path / "run", **settings(url, train__stop_after_steps=3))) == 0
    (event,) = [event for event in read_events(tmp_path / "run", "resume") if event["kind"] == "passed over"]
    assert f"step-00000004 of {url}: {name}: {len(content)} bytes with SHA-256" in event["text"]
    assert read_events(tmp_path / "run", "start")[0]["resumed_from"] == "step-00000002"
    for step in RemoteCheckpoints(url).list_objects():
        obstore.put(client, f"{step}/manifest.json", b"{}")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"none of the \d checkpoints in s3://.* can be loaded: .* to start over"):
        train(tiny_config(data, tmp_path / "run", **settings(url)))


def save_by_hand(checkpoint_dir: Path, step: int) -> Path:
    """A checkpoint of two files of ranks in different blocks, without tensors of a model."""
    files = {}
    for rank in (0, 300):
        name = rank_file_name(rank)
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        entry = write_tensors(make_place(checkpoint_dir, name), {"random/torch": torch.arange(rank + step)}, {})
        files[name] = {"bytes": entry.num_bytes, "sha256": entry.sha256}
    body = {**{name: {} for name in MAPPINGS}, "step": step, "files": files}
    (checkpoint_dir / "manifest.json").write_text(encode_manifest(body))
    return checkpoint_dir


def test_files_in_folders_of_blocks_are_sent_fetched_and_removed(tmp_path: Path, url: str) -> None:
    store, names = RemoteCheckpoints(url), ["manifest.json", rank_file_name(0), rank_file_name(300)]
    first, second = (save_by_hand(tmp_path / "own" / f"step-0000000{step}", step) for step in (1, 2))
    assert store.push(first, ALONE, 1) == []
    assert store.pull_newer(tmp_path / "fetched", ALONE).passed_over == ()
    (fetched,) = list_checkpoints(tmp_path / "fetched")
    assert all((fetched / name).read_bytes() == (first / name).read_bytes() for name in names)
    assert store.push(second, ALONE, 1) == []
    assert sorted(facts.name for facts in store.folder.list()) == [f"{second.name}/{name}" for name in names]


def test_a_copy_that_someone_marked_gets_another_place_and_a_release_reaches_the_store(
    data: DataConfig, tmp_path: Path, url: str
) -> None:
    store, path = RemoteCheckpoints(url), save_by_hand(tmp_path / "run/checkpoints" / "step-00000001", 1)
    mark(path)
    assert store.push(path, ALONE, 1) == []
    before = store.list_objects()[path.name]
    assert store.push(path, ALONE, 1) == [] and not store.list_objects("replaced-1"), "the same content"
    shutil.rmtree(path)
    mark(save_by_hand(path, 1))
    body = {name: {} for name in MAPPINGS} | {
        "step": 1,
        "files": read_manifest(path)["files"],
        "versions": {"torch": "2"},
    }
    (path / "manifest.json").write_text(encode_manifest(body))
    assert store.push(path, ALONE, 1) == []
    assert store.list_objects("replaced-1") == {path.name: before}
    config = tiny_config(data, tmp_path / "run", train__checkpoint_store=url)
    (tmp_path / "run/config.yaml").write_text(resolved_yaml(config))
    mark_checkpoint(path, protect=False)
    assert store.list_objects()[path.name] == [name for name in before if name != "keep"]


def test_an_unknown_kind_of_url_is_refused_before_anything_starts(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.checkpoint_store = ftp://a: must begin with s3://"):
        check_run(tiny_config(data, tmp_path, train__checkpoint_store="ftp://a"))


def test_a_copy_that_cannot_be_sent_is_a_remark(data: DataConfig, tmp_path: Path, server: dict[str, str]) -> None:
    url = "s3://no-such-bucket/run"
    assert train(tiny_config(data, tmp_path / "run", model__pattern="E-", train__stop_after_steps=1)) == 0
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    (remark,) = RemoteCheckpoints(url).push(saved, ALONE, 2)
    assert (
        remark.startswith(f"step-00000001 was not copied to {url}: ") and "no-such-bucket" in remark.partition(": ")[2]
    )
    with pytest.raises(RuntimeError, match=r"checkpoints of s3://no-such-bucket/run were not fetched: rank 0: "):
        RemoteCheckpoints(url).pull_newer(tmp_path / "new", ALONE)


@pytest.mark.slow
def test_a_start_sends_what_the_store_lacks_also_of_a_finished_run(data: DataConfig, tmp_path: Path, url: str) -> None:
    assert train(tiny_config(data, tmp_path / "run", train__steps=3, schedule__warmup_steps=1)) == 0
    config = tiny_config(data, tmp_path / "run", train__steps=3, schedule__warmup_steps=1, train__checkpoint_store=url)
    for copies in (1, 1):
        assert train(config) == 0
        assert list(RemoteCheckpoints(url).list_objects()) == ["step-00000003"]
        assert [event["problem"] for event in read_events(tmp_path / "run", "copied")] == copies * [None]


@pytest.mark.slow
def test_a_marked_checkpoint_stays_in_the_store(data: DataConfig, tmp_path: Path, url: str) -> None:
    config = tiny_config(data, tmp_path / "run", train__steps=3, train__checkpoint_every_steps=1, train__keep_last=3)
    assert train(config) == 0
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    mark(checkpoints[0])
    store = RemoteCheckpoints(url)
    for checkpoint in checkpoints:
        assert store.push(checkpoint, ALONE, keep_last=1) == []
        mark(checkpoints[1])  # after it was sent
    assert list(store.list_objects()) == ["step-00000003", "step-00000002", "step-00000001"]
    assert store.push(checkpoints[1], ALONE, keep_last=1) == []
    store.folder.delete(["step-00000003/manifest.json"])
    assert store.pull_newer(tmp_path / "fetched", ALONE).name == "step-00000002"
    assert is_marked(tmp_path / "fetched/step-00000002")


def test_a_run_whose_last_copy_cannot_be_sent_fails_and_the_same_command_sends_it(
    data: DataConfig, tmp_path: Path, server: dict[str, str]
) -> None:
    bucket, url = f"{server['AWS_ENDPOINT_URL']}/copies", "s3://copies/run"
    config = tiny_config(data, tmp_path / "run", model__pattern="E-", train__checkpoint_store=url)
    for method, code in (("DELETE", 3), ("PUT", 0)):
        urllib.request.urlopen(urllib.request.Request(bucket, method="PUT"))
        with SignalWatch() as signals:
            run = start_run(config, signals)
            urllib.request.urlopen(urllib.request.Request(bucket, method=method))
            assert run_steps(run) == code
            close_run(run)
    (failed,) = read_events(tmp_path / "run", "failed")
    assert (
        f"the checkpoint of step 4 is in {tmp_path / 'run'} and not in train.checkpoint_store={url}" in failed["error"]
    )
    assert list(RemoteCheckpoints(url).list_objects()) == ["step-00000004"]


@pytest.mark.slow
def test_a_large_file_is_sent_in_parts_and_appears_as_a_whole(tmp_path: Path, url: str) -> None:
    content = os.urandom(2 * PART_BYTES + 12345)
    (tmp_path / "large").write_bytes(content)
    folder = RemoteFolder(url)
    folder.write_file("large", tmp_path / "large")
    assert folder.read("large") == content
    assert "-" in obstore.head(from_url(url), "large")["e_tag"], "S3 marks what came in parts"


def train_ranks(data: DataConfig, folder: str, url: str, variables: dict[str, str], stop: int) -> int:
    os.environ.update(variables)
    return train(
        tiny_config(data, Path(folder), **settings(url, train__micro_batch_size=1, train__stop_after_steps=stop))
    )


@pytest.mark.slow
def test_several_ranks_send_and_fetch_their_shares(
    data: DataConfig, tmp_path: Path, url: str, server: dict[str, str]
) -> None:
    for folder, stop in (("straight", 6), ("first", 4), ("second", 6)):
        where = f"{url}/{'other' if folder == 'straight' else 'run'}"
        assert run_ranks(train_ranks, data, str(tmp_path / folder), where, server, stop) == [0, 0]
    assert read_events(tmp_path / "second", "start")[0]["resumed_from"] == "step-00000004"
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("straight", "second")]
    assert losses[1] == losses[0][4:]


def pull_message(folder: str, url: str, variables: dict[str, str]) -> str:
    os.environ.update(variables)
    ranks = RankGroup(initialize_parallel(timeout_seconds=PATIENCE_SECONDS).rank, 2)
    with pytest.raises(RuntimeError) as raised:
        RemoteCheckpoints(url).pull_newer(Path(folder), ranks)
    return str(raised.value)


def test_several_ranks_tell_a_damage_once(tmp_path: Path, url: str, server: dict[str, str]) -> None:
    obstore.put(from_url(url), "step-00000002/manifest.json", b"{}")
    first, second = run_ranks(pull_message, str(tmp_path), url, server)
    assert first == second and first.count("is not an amfm checkpoint manifest") == 1


def two_runs(data: DataConfig, folder: Path) -> tuple[Path, Path, Path]:
    """Step 1 of a run, its step 2, and another step 2."""
    settings = {"model__pattern": "E-", "train__stop_after_steps": 2, "train__checkpoint_every_steps": 1}
    for name, seed in (("run", 0), ("other", 1)):
        assert train(tiny_config(data, folder / name, **settings, train__seed=seed)) == 0
    second, first = list_checkpoints(folder / "run" / "checkpoints")
    return first, second, list_checkpoints(folder / "other" / "checkpoints")[0]


def test_killed_while_a_step_is_sent_anew_no_manifest_names_files_of_two(
    data: DataConfig, tmp_path: Path, url: str, server: dict[str, str]
) -> None:
    _, second, older = two_runs(data, tmp_path)
    with killing_proxy(server["AWS_ENDPOINT_URL"]) as (endpoint, gate):
        for kill in (2, 3):  # the manifest is gone; the first file is not there yet, or it is
            assert RemoteCheckpoints(f"{url}/{kill}").push(older, ALONE, 2) == []
            assert killed(gate, kill, send, str(second), f"{url}/{kill}", endpoint) == -9
            assert RemoteCheckpoints(f"{url}/{kill}").pull_newer(tmp_path / f"copy {kill}", ALONE).passed_over == ()
            assert list_checkpoints(tmp_path / f"copy {kill}") == []


@pytest.mark.slow
def test_killed_at_any_request_the_store_holds_a_whole_checkpoint(
    data: DataConfig, tmp_path: Path, url: str, server: dict[str, str]
) -> None:
    """A process that copies step 2 over the store with step 1, and over one with another step 2, dies at each request."""
    first, second, older = two_runs(data, tmp_path)
    with killing_proxy(server["AWS_ENDPOINT_URL"]) as (endpoint, gate):
        for again in (False, True):
            kill, code = 0, -9
            while code == -9:
                place, copy = f"{url}/{again}-{kill}", tmp_path / f"{again}-{kill}"
                for checkpoint in (first, older) if again else (first,):
                    assert RemoteCheckpoints(place).push(checkpoint, ALONE, 2) == []
                code = killed(gate, kill, send, str(second), place, endpoint)
                assert RemoteCheckpoints(place).pull_newer(copy, ALONE).passed_over == ()
                (found,) = list_checkpoints(copy)
                assert inspect_checkpoint(found)["ok"] and found.name in (first.name, second.name)
                assert RemoteCheckpoints(place).push(second, ALONE, 1) == []
                assert list(RemoteCheckpoints(place).list_objects()) == [second.name]
                kill += 1
            assert code == 0 and kill > 6, "each object and each deletion was a request"


@pytest.mark.slow
def test_killed_at_any_request_a_step_that_is_renamed_is_whole_in_one_place(
    tmp_path: Path, url: str, server: dict[str, str]
) -> None:
    step = save_by_hand(tmp_path / "step-00000001", 1)
    names = ["manifest.json", rank_file_name(0), rank_file_name(300)]
    with killing_proxy(server["AWS_ENDPOINT_URL"]) as (endpoint, gate):
        kill, code = 0, -9
        while code == -9:
            store = RemoteCheckpoints(f"{url}/{kill}")
            assert store.push(step, ALONE, 2) == []
            code = killed(gate, kill, send_aside, step.name, store.folder.url, endpoint, names)
            here, aside = store.list_whole(), store.list_whole("aside")
            assert all(sorted(objects) == sorted(names) for objects in (*here.values(), *aside.values()))
            assert here or aside
            kill += 1
        assert code == 0 and not here and aside and kill > 9, "each copy and each deletion was a request"
