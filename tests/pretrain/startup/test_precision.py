"""What `train.precision: auto` is: the main rank's choice, kept by a resume."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.launch.plan.hardware import HARDWARE
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.parallel import start_process_group
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.startup.precision import MARGIN, faster_on_processor, settle_precision
from amfm.pretrain.train import train
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import read_events, tiny_config


@pytest.fixture(scope="module")
def one_step(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of one step in each precision; one of them is not what this machine would choose."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("float32", "bf16")}
    for name, folder in folders.items():
        assert train(tiny_config(data, folder, train__precision=name, train__stop_after_steps=1)) == 0
    return folders


def test_a_choice_is_recorded(data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_config(data, tmp_path, train__precision="auto", train__stop_after_steps=1)) == 0
    chosen = load_config(tmp_path / "config.yaml").train.precision
    (event,) = read_events(tmp_path, "precision")
    assert event["text"].startswith(f"train.precision auto is {chosen}: ")
    assert event["text"] in " ".join(capsys.readouterr().err.split())


def settle_on(*configs: RunConfig) -> str:
    """What a rank computes in, whose own choice would be that of the configuration with its number."""
    rank, world_size, _, _ = start_process_group(PATIENCE_SECONDS)
    return settle_precision(configs[rank], RankGroup(rank, world_size))[0].train.precision


def test_all_ranks_compute_in_the_precision_that_the_main_rank_chooses(
    data: DataConfig, one_step: dict[str, Path]
) -> None:
    first, other = (tiny_config(data, one_step[name], train__precision="auto") for name in ("bf16", "float32"))
    assert [settle_precision(config)[0].train.precision for config in (first, other)] == ["bf16", "float32"]
    assert run_ranks(settle_on, first, other) == ["bf16", "bf16"]


def test_a_resume_keeps_the_precision_of_its_checkpoint(data: DataConfig, one_step: dict[str, Path]) -> None:
    for precision, folder in one_step.items():
        assert train(tiny_config(data, folder, train__precision="auto", train__stop_after_steps=2)) == 0
        assert load_config(folder / "config.yaml").train.precision == precision
        (event,) = read_events(folder, "precision")
        assert event["text"] == f"train.precision auto is {precision}: step-00000001 was saved by a run in it"
        assert not [event for event in read_events(folder, "resume") if "train.precision" in event["text"]]


def test_the_choice_follows_the_products_that_were_timed() -> None:
    threads = torch.get_num_threads()
    precision, reason = faster_on_processor()
    (ratio,) = re.findall(r"([0-9.]+) times", reason)
    assert precision == "bf16" if float(ratio) > MARGIN + 0.1 else float(ratio) > MARGIN or precision == "float32"
    assert torch.get_num_threads() == threads
    if gemm_dtype(torch.ones(1, dtype=torch.bfloat16)) == torch.float32:
        assert float(ratio) == pytest.approx(1, abs=1)  # both were products in float32


def test_a_plan_takes_the_precision_of_its_accelerator(data: DataConfig, tmp_path: Path) -> None:
    assert HARDWARE["h100"].settle(tiny_config(data, tmp_path, train__precision="auto")).train.precision == "bf16"
    slow = HARDWARE["h100"].model_copy(update={"bf16_flops": 1.0})
    assert slow.settle(tiny_config(data, tmp_path, train__precision="auto")).train.precision == "float32"
    assert slow.settle(tiny_config(data, tmp_path, train__precision="bf16")).train.precision == "bf16"
