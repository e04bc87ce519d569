"""The loop as a user meets it: files, stops, signals, validation, rejections."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from amfm.data_pipeline.config import DataConfig, PhaseConfig, TokenizerConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.pretrain.checkpoint.manifest_file import read_manifest
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.hooks.validate import Validation
from amfm.pretrain.monitor.ownership import lock_directory
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.packages import OWN_CODE, collect_versions
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from amfm.pretrain.train import run_steps, train
from tests.helpers.full_disk import largest_file
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.processes.zygote import call
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny_store import make_tiny_store, run_in_process
from tests.pretrain.tiny_run import collect_weights, read_events, read_metrics, tiny_config, validate_now

METRICS = {
    "step",
    "time",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "tflops_per_gpu",
    "megatron_tflops_per_gpu",
    "mfu",
    "seconds",
    "auxiliary",
    "auxiliary_mean",
    "expert_load",
    "memory_bytes",
    "data",
    "skipped",
}

VALIDATION = {"validation_loss", "validation_seconds", "validation_bits_per_byte", "validation_by_source"}


def test_run_directory_holds_config_environment_metrics_and_events(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, train__validate_every_steps=2)
    assert train(config) == 0
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [set(line) - METRICS for line in lines] == [set(), VALIDATION, set(), VALIDATION]
    assert lines[1]["validation_by_source"] == {"source0": pytest.approx(lines[1]["validation_loss"], rel=1e-6)}
    assert 0 < lines[1]["validation_bits_per_byte"] < lines[1]["validation_loss"] / math.log(2)
    assert [line["tokens"] for line in lines] == [192, 384, 576, 768]
    assert [sum(line["data"]["tokens"].values()) for line in lines] == [192, 384, 576, 768]
    assert lines[0]["loss"] == pytest.approx(math.log(448), abs=0.1), "an untrained model knows nothing"
    assert lines[0]["lr"] == pytest.approx(1.5e-3) and lines[1]["lr"] == pytest.approx(3e-3)
    assert set(lines[0]["auxiliary"]) == {"balance", "router_z"} == set(lines[0]["auxiliary_mean"])
    assert lines[0]["auxiliary_mean"]["balance"] == pytest.approx(lines[0]["auxiliary"]["balance"] / 0.01)
    assert 1 <= lines[0]["expert_load"]["1"] <= 4
    assert all(line["mfu"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert all(2**24 < line["memory_bytes"] < 2**40 for line in lines)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config.model_dump(mode="json")
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["peak"]["flops_per_second"] > 1e7 and "measured" in environment["peak"]["source"]
    assert environment["keeps_freed_memory"] is True
    events = [event["event"] for event in read_events(tmp_path)]
    assert events == ["start", "validation", "validation", "checkpoint", "end"]
    (start,) = read_events(tmp_path, "start")
    assert start["hosts"] == {socket.gethostname(): "0"} and start["code"] == collect_versions()[OWN_CODE]
    assert start["versions"] == {name: text for name, text in collect_versions().items() if name != OWN_CODE}
    assert (tmp_path / start["config"]).read_text() == (tmp_path / "config.yaml").read_text()
    assert start["config_sha256"] == read_manifest(tmp_path / "checkpoints/step-00000004")["config_sha256"]
    assert (tmp_path / "checkpoints" / "latest").exists()


@pytest.mark.slow  # a run across stages, which become phases, is quick (test_stages.py)
def test_a_phase_makes_rows_longer_during_the_run_and_after_a_resume(data: DataConfig, tmp_path: Path) -> None:
    longer = data.model_copy(update={"phases": (PhaseConfig(start_sample=8, sequence_length=96),)})
    whole, halves = tiny_config(longer, tmp_path / "whole"), tiny_config(longer, tmp_path / "halves")
    assert train(whole) == 0
    train_settings = halves.train.model_copy(update={"stop_after_steps": 1})
    assert train(halves.model_copy(update={"train": train_settings})) == 0
    assert train(halves) == 0
    lines, resumed = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "halves")
    assert [line["tokens"] for line in lines] == [192, 384, 768, 1152]
    assert [(line["data"]["phase"], sum(line["data"]["tokens"].values())) for line in lines] == [
        (0, 192),
        (0, 384),
        (1, 384),
        (1, 768),
    ]
    for key in ("loss", "grad_norm", "tokens", "data"):
        assert [line[key] for line in resumed] == [line[key] for line in lines], key


def test_a_source_joins_a_run_that_has_begun(tmp_path: Path) -> None:
    both = make_tiny_store(tmp_path / "data", num_documents=200, mean_words=12, num_sources=2)
    new = both.sources[1].model_copy(update={"weight": 0.0})
    phase = PhaseConfig(start_sample=8, weights={"source0": 1.0, "source1": 1.0})
    alone = both.model_copy(update={"sources": both.sources[:1], "store": str(tmp_path / "store")})
    joined = alone.model_copy(update={"sources": (both.sources[0], new), "phases": (phase,)})
    prepare(alone, runner=run_in_process)
    assert train(tiny_config(alone, tmp_path / "run", model__pattern="E-", train__stop_after_steps=2)) == 0
    prepare(joined, runner=run_in_process)
    assert train(tiny_config(joined, tmp_path / "run", model__pattern="E-")) == 0
    assert train(tiny_config(joined, tmp_path / "whole", model__pattern="E-")) == 0
    lines, whole = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole")
    for key in ("loss", "grad_norm", "data"):
        assert [line[key] for line in lines] == [line[key] for line in whole], key
    assert set(lines[-1]["data"]["tokens"]) == {"source0", "source1"}
    reweighed = joined.model_copy(update={"sources": (both.sources[0], both.sources[1]), "phases": ()})
    words = r"with the weights source0 1 in sequences of 48; from sample 8 source0 1, source1 1 in sequences of 48 up to sample \d+, this run"
    with pytest.raises(
        ValueError, match=words + r" has the weights .*; past weights and samples left out cannot change"
    ):
        train(tiny_config(reweighed, tmp_path / "run", model__pattern="E-"))


def test_stop_after_steps_saves_and_the_schedule_spans_the_whole_run(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, train__steps=10, train__stop_after_steps=3)
    assert train(config) == 0
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["lr"] == pytest.approx(3e-3), "the decay starts after step 8 of 10"
    assert read_events(tmp_path)[-1]["reason"] == "stop_after_steps"
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000003"]


def test_a_finished_run_does_nothing_more(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, model__pattern="E-")
    assert train(config) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_start_on_a_full_disk_leaves_the_records_of_the_run_as_they_were(data: DataConfig, tmp_path: Path) -> None:
    assert train(tiny_config(data, tmp_path, train__stop_after_steps=2)) == 0
    names = ("config.yaml", "environment.json", "metrics.jsonl")
    before = [(tmp_path / name).read_bytes() for name in names]
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        train(tiny_config(data, tmp_path))
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_a_run_that_never_validates_needs_no_validation_documents(tmp_path: Path) -> None:
    data = make_tiny_store(tmp_path / "data", num_documents=40, mean_words=12, validation_fraction=0.0)
    held = data.model_copy(update={"validation_fraction": 0.1})
    assert train(tiny_config(held, tmp_path / "run", train__steps=3)) == 0
    assert "has no validation documents" in read_events(tmp_path / "run", "not_validated")[0]["text"]
    assert "validation_loss" not in read_metrics(tmp_path / "run")[-1]
    with pytest.raises(ValueError, match=r"has no validation documents .* with data.validation_fraction=0"):
        train(tiny_config(held, tmp_path / "other", train__steps=3, train__validate_every_steps=1))


def test_validation_measures_the_same_text_each_time_and_changes_nothing(data: DataConfig, tmp_path: Path) -> None:
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path), signals)
        weights, random, cursor = collect_weights(run), torch.get_rng_state(), run.loader.state_dict()
        first, second = validate_now(run), validate_now(run)
        assert first == second and first.tokens > 100
        assert first.by_source["source0"].tokens == first.tokens
        assert first.by_source["source0"].loss == pytest.approx(first.loss, rel=1e-6)
        assert first.perplexity == pytest.approx(math.exp(first.loss))
        assert torch.equal(torch.get_rng_state(), random) and run.loader.state_dict() == cursor
        assert all(torch.equal(weight, weights[name]) for name, weight in collect_weights(run).items())
        train_step(run)
        assert validate_now(run).loss != first.loss
        close_run(run)


def test_each_batch_of_a_validation_is_progress_to_the_watchdog(data: DataConfig, tmp_path: Path) -> None:
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path, train__validation_batches=3), signals)
        phases: list[str] = []
        run.heartbeat.listener = phases.append
        validate_now(run)
        assert phases == ["validate"] * 3
        close_run(run)


def validate_two_sources(data: DataConfig, folder: str, layouts: list[dict[str, int]]) -> list[Validation]:
    results = []
    for number, layout in enumerate(layouts):
        with SignalWatch() as signals:
            settings = {"train__global_batch_size": 8, "train__validation_batches": 3}
            place = Path(folder, f"run-{os.environ['WORLD_SIZE']}-{number}")
            config = tiny_config(data, place, **settings)
            parallel = config.parallel.model_copy(update=layout)
            run = start_run(config.model_copy(update={"parallel": parallel}), signals)
            results.append(validate_now(run))
            close_run(run)
    return results


@pytest.mark.slow
def test_each_source_has_its_loss_on_one_rank_and_on_two_on_any_axis(tmp_path: Path) -> None:
    both = make_tiny_store(tmp_path / "data", num_documents=200, mean_words=12, num_sources=2)
    ((alone,),) = run_ranks(validate_two_sources, both, str(tmp_path), [{}], num_ranks=1)
    layouts = [{}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}]
    on_two = run_ranks(validate_two_sources, both, str(tmp_path), layouts)
    for result in [result for of_rank in on_two for result in of_rank]:
        assert set(result.by_source) == {"source0", "source1"}
        assert sum(source.tokens for source in result.by_source.values()) == result.tokens
        nll = sum(source.loss * source.tokens for source in result.by_source.values())
        assert nll / result.tokens == pytest.approx(result.loss, rel=1e-6)
        assert result.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-5)
        for name, source in result.by_source.items():
            assert source.loss == pytest.approx(alone.by_source[name].loss, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_clipping_bounds_the_step_but_not_the_reported_norm(
    data: DataConfig, tmp_path: Path, clip: float | None
) -> None:
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path, optimizer__clip_grad_norm=clip), signals)
        norm = train_step(run).grad_norm
        moments = [state["exp_avg"] for state in run.engine.adamw.state.values()]
        # After one step the first moment is (1 - beta1) times the gradient that AdamW got.
        used = float(torch.linalg.vector_norm(torch.stack([moment.norm() for moment in moments]))) / 0.1
        close_run(run)
    assert norm > 0.5
    assert used == pytest.approx(norm if clip is None else clip, rel=1e-4)


def test_a_background_save_that_fails_ends_the_run_before_the_next_save(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, train__steps=16, train__checkpoint_every_steps=8)
    with (
        largest_file(100_000),  # less than a checkpoint, more than the log
        pytest.raises(RuntimeError, match=r"checkpoint of step 8 .*was not saved.*File too large"),
    ):
        train(config)
    assert 8 < read_metrics(tmp_path)[-1]["step"] < 16
    assert read_events(tmp_path)[-1]["event"] == "failed"


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS  # on a busy machine it starts slowly
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} has not reached {count} lines")


def train_and_exit(config: RunConfig) -> None:
    """What `amfm train` does, in a fork."""
    sys.exit(train(config))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_at_the_next_boundary_and_the_run_goes_on(
    data: DataConfig, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = call(train_and_exit, tiny_config(data, tmp_path / "run", train__steps=100_000))
    try:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2)
        os.kill(process.pid, number)
        assert process.wait() == code
    finally:
        process.kill()
    step = read_metrics(tmp_path / "run")[-1]["step"]
    assert read_events(tmp_path / "run")[-1] | {"time": ""} == {
        "time": "",
        "event": "signal",
        "step": step,
        "name": number.name,
    }
    longer = tiny_config(data, tmp_path / "run", train__steps=100_000, train__stop_after_steps=step + 1)
    assert train(longer) == 0
    assert read_events(tmp_path / "run", "start")[-1]["resumed_from"] == f"step-{step:08d}"
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, step + 2))


def signal_one_rank(data: DataConfig, folder: str) -> tuple[int, int]:
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, Path(folder), train__steps=100), signals)
        train_step(run)
        if run.parallel.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        code = run_steps(run)
        close_run(run)
    return code, run.progress.step


def test_a_signal_to_one_rank_stops_all_at_the_same_step(data: DataConfig, tmp_path: Path) -> None:
    assert run_ranks(signal_one_rank, data, str(tmp_path), num_ranks=2) == [(0, 2), (0, 2)]
    assert read_events(tmp_path, "signal")[0]["name"] == "SIGUSR1"
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_two_runs_in_one_directory_are_refused(data: DataConfig, tmp_path: Path) -> None:
    with lock_directory(tmp_path), pytest.raises(RuntimeError, match=r"another process trains in .*another run\.dir"):
        train(tiny_config(data, tmp_path))


def test_a_secret_of_the_setup_is_in_no_record(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["amfm", "train", "run.yaml", "launch.setup=export TOKEN=hunter2"])
    settings = {"train__steps": 4, "train__checkpoint_every_steps": 1, "launch__setup": "export TOKEN=hunter2"}
    for steps in (1, 2):  # the second start compares its settings with those of the first
        assert train(tiny_config(data, tmp_path, **settings, train__stop_after_steps=steps)) == 0
    texts = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [name for name, text in texts.items() if b"hunter2" in text]
    assert b"false # launch.setup is not recorded" in texts["config.yaml"]


def test_a_damaged_tokenizer_in_the_store_is_noticed_before_training(data: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(data.store, tmp_path / "store")
    model = bytearray((tmp_path / "store" / "tokenizer.model").read_bytes())
    model[-1] ^= 1
    (tmp_path / "store" / "tokenizer.model").write_bytes(model)
    with pytest.raises((RuntimeError, ValueError), match=r"tokenizer\.model"):
        train(tiny_config(data.model_copy(update={"store": str(tmp_path / "store")}), tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_vocabulary_smaller_than_the_stores_is_refused(data: DataConfig, tmp_path: Path) -> None:
    smaller = data.model_copy(update={"tokenizer": TokenizerConfig(vocab_size=300)})
    config = tiny_config(smaller, tmp_path, model__vocab_size=320)
    with pytest.raises(ValueError, match=r"model\.vocab_size=320 must be at least 400"):
        train(config)


def test_batch_that_ranks_cannot_share_is_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size"):
        train(tiny_config(data, tmp_path, train__global_batch_size=5))
    assert not (tmp_path / "checkpoints").exists()
