"""The files of a run's log."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.monitor.metrics import Cut, RunLog, check_plot_services, flatten_numbers, keep_until
from tests.pretrain.tiny_run import read_events, read_metrics, tiny_config

HAS_WANDB = importlib.util.find_spec("wandb") is not None


def test_resume_drops_steps_to_be_done_again_and_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in (1, 2))
        + '{"step": 3, "seconds": 1.5}\n{"step": 4, "seconds": null}\n{"step": 5, "lo'
    )
    assert keep_until(path, 2) == Cut(damaged=1, steps=2, seconds=1.5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert keep_until(tmp_path / "absent.jsonl", 2) == Cut()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_leaves_out_lines_that_are_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('null\n[1]\n{"step": "2"}\n{"loss": 1}\n{"step": 2}\n')
    assert keep_until(path, 2).damaged == 4
    assert path.read_text() == '{"step": 2}\n'


def test_a_link_in_the_place_of_a_log_or_of_its_temporary_name_leads_nowhere(data: DataConfig, tmp_path: Path) -> None:
    precious, run_dir = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run_dir / "metrics.tmp").symlink_to(precious)
    assert keep_until(run_dir / "metrics.jsonl", 1).damaged == 0
    (run_dir / "events.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match=r"events\.jsonl"):
        RunLog(tiny_config(data, run_dir), resumed_at_step=1)
    assert precious.read_text() == "mine"
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 1}\n' and not (run_dir / "metrics.jsonl").is_symlink()


def test_plots_that_the_disk_refuses_are_said_once_and_end_no_run(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tiny_config(data, tmp_path, run__tensorboard=True), resumed_at_step=0)
    (plots,) = (tmp_path / "tensorboard").iterdir()
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "full").replace(plots)  # in one piece: the writer's thread creates the file again where it finds none
    for step in range(1, 200):  # its thread writes some time later
        log.write_metrics({"step": step, "loss": 2.0})
        time.sleep(0.001)
    log.sync()
    log.close()
    said = capsys.readouterr().err
    assert said.count("TensorBoard's files in") == 1 and "No space left on device; training continues" in said
    (event,) = read_events(tmp_path)
    assert event["event"] == "tensorboard_failed" and len(read_metrics(tmp_path)) == 199


def test_a_run_directory_that_was_moved_is_named_before_a_checkpoint_goes_elsewhere(
    data: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    log = RunLog(tiny_config(data, tmp_path / "run"), resumed_at_step=0)
    log.sync()
    (tmp_path / "run").rename(tmp_path / "moved")
    for _ in ("gone", "another one in its place"):
        with pytest.raises(RuntimeError, match="run is not the folder any more that this run writes to"):
            log.sync()
        (tmp_path / "run").mkdir(exist_ok=True)
    log.close()


def test_nested_numbers_are_named_by_their_path() -> None:
    metrics = {"step": 3, "loss": 1.5, "expert_load": {"1": 2.0}, "grad_norm": None, "note": "x"}
    assert flatten_numbers(metrics) == {"loss": 1.5, "expert_load/1": 2.0}


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_gets_every_number_in_groups_and_losses_over_tokens(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, run__tensorboard=True)
    for first in (1, 2):  # the second is done again
        log = RunLog(config, resumed_at_step=first - 1)
        for step in (first, first + 1):
            log.write_metrics({"step": step, "loss": 2.0 * first, "tokens": 64 * step, "expert_load": {"1": 1.25}})
        log.close()
    found = read_scalars(tmp_path / "tensorboard")
    assert set(found) == {"loss/train", "moe/load/001", "progress/tokens"}
    assert found["loss/train"] == [(1, 2.0), (2, 4.0), (3, 4.0)]
    assert read_scalars(tmp_path / "tensorboard" / "by_tokens") == {
        "loss_by_tokens/train": [(64, 2.0), (128, 4.0), (192, 4.0)]
    }


def test_a_run_of_a_release_before_keeps_its_names(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    log = RunLog(tiny_config(data, tmp_path, run__tensorboard=True), resumed_at_step=3)
    log.write_metrics({"step": 4, "loss": 2.0, "tokens": 64, "expert_load": {"1": 1.25}})
    log.close()
    assert set(read_scalars(tmp_path / "tensorboard")) == {"loss", "expert_load/1", "tokens"}


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_wandb_without_its_package_is_refused_with_a_remedy(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, run__wandb_project="hybrids")
    with pytest.raises(ValueError, match=r"run\.wandb_project=hybrids needs wandb, .*pip install '\.\[wandb\]'"):
        check_plot_services(config)


@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")
def test_wandb_keeps_an_offline_run_in_the_run_directory(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_config(data, tmp_path, run__wandb_project="hybrids")
    log = RunLog(config, resumed_at_step=0)
    log.write_metrics({"step": 1, "loss": 2.0})
    log.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
