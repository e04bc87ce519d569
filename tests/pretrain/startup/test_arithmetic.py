"""How a run computes: precision is the main rank's choice, kept by a resume; which kernels it takes on a CPU; the same tiles on all ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.kernels.common.gemm_precision import gemm_dtype
from amfm.kernels.runtime import native, tuning
from amfm.kernels.runtime.native import refuse_native
from amfm.kernels.runtime.tuning import Environment, Table, choose_table
from amfm.launch.plan.hardware import HARDWARE
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.parallel import initialize_parallel, start_process_group
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.startup.arithmetic import (
    MARGIN,
    faster_on_processor,
    find_earlier_kernels,
    resolve_precision,
    share_native,
)
from amfm.pretrain.startup.model import choose_backend
from amfm.pretrain.train import train
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL, read_events, read_metrics, tiny_config


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
    return resolve_precision(configs[rank], RankGroup(rank, world_size))[0].train.precision


def test_all_ranks_compute_in_the_precision_that_the_main_rank_chooses(
    data: DataConfig, one_step: dict[str, Path]
) -> None:
    first, other = (tiny_config(data, one_step[name], train__precision="auto") for name in ("bf16", "float32"))
    assert [resolve_precision(config)[0].train.precision for config in (first, other)] == ["bf16", "float32"]
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
    assert (
        HARDWARE["h100"].with_precision(tiny_config(data, tmp_path, train__precision="auto")).train.precision == "bf16"
    )
    slow = HARDWARE["h100"].model_copy(update={"bf16_flops": 1.0})
    assert slow.with_precision(tiny_config(data, tmp_path, train__precision="auto")).train.precision == "float32"
    assert slow.with_precision(tiny_config(data, tmp_path, train__precision="bf16")).train.precision == "bf16"


FIT = MODEL | {"pattern": "M-", "mamba": MODEL["mamba"] | {"chunk_size": 64}, "moe": None}
needs_compiler = pytest.mark.skipif(refuse_native(torch.device("cpu")) is not None, reason="no C compiler")


@needs_compiler
def test_auto_is_native_code_and_a_resume_under_other_kernels_says_that_numbers_differ(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: str, backend: str, stop: int | None = None) -> None:
        model = {f"model__{key}": value for key, value in FIT.items()}
        config = tiny_config(
            data, tmp_path / folder, **model, kernels__backend=backend, train__stop_after_steps=stop, train__steps=4
        )
        assert train(config) == 0

    run("torch", "torch")
    run("native", "auto", stop=2)
    assert "native kernels" in capsys.readouterr().err
    assert find_earlier_kernels(tmp_path / "native") == "native"
    run("native", "torch")
    (event,) = (event for event in read_events(tmp_path / "native", "resume") if "kernels were" in event["text"])
    assert event["text"] == "kernels were native and are torch: numbers differ from here on in their last bits"
    by_torch, by_native = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("torch", "native"))
    assert by_native == pytest.approx(by_torch, rel=1e-5)


def choose(config: RunConfig) -> str:
    """The backend on a rank, of which the second one has no compiler."""
    parallel = initialize_parallel(config.parallel, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    if parallel.rank == 1:
        os.environ["CC"] = "no-such-compiler"
        for found in (native._try_native, native.load_library):
            found.cache_clear()  # by the process that this one is a fork of
    share_native(config, parallel, choose_backend(config, parallel))
    return choose_backend(config, parallel)


@needs_compiler
@pytest.mark.slow
def test_all_ranks_compute_in_pytorch_where_one_has_no_compiler(data: DataConfig, tmp_path: Path) -> None:
    model = {f"model__{key}": value for key, value in FIT.items()}
    assert run_ranks(choose, tiny_config(data, tmp_path, **model, kernels__backend="auto")) == ["torch", "torch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "kernels.backend = native: has no block to run: native code takes states x heads of multiples of 16 in chunks of 64; got 16 x 16 in 16",
        ),
        ({"model__pattern": "*-"}, "kernels.backend = native: has no block to run: no block has native code"),
    ],
)
def test_native_code_that_a_run_asks_for_and_does_not_fit_is_an_error(
    changes: dict[str, str], message: str, data: DataConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_run(tiny_config(data, tmp_path, kernels__backend="native", **changes))
    assert message in str(caught.value)


HOPPER = Environment("NVIDIA H100 80GB HBM3", "3.9.0", "13.4.59")
AMPERE = Environment("NVIDIA A100", "3.9.0", "13.4.59")
TUNED, OTHER = {"scan_walk 64": {"num_warps": 4}}, {"scan_walk 64": {"num_warps": 8}}


def test_rank_0_decides_among_equal_cards_and_nobody_among_different_ones() -> None:
    assert choose_table([Table(HOPPER, TUNED), Table(HOPPER, OTHER)]).configs == TUNED
    assert choose_table([Table(HOPPER, TUNED), Table(AMPERE, OTHER)]) is None


def agree(tables: list[Table]) -> list[dict[str, dict[str, int]]]:
    """On one of two ranks: agree on its own table, then ask as a launch asks; default tiles come first among candidates."""
    from amfm.pretrain.parallel import start_process_group
    from amfm.pretrain.startup.arithmetic import agree_on_tiles

    start_process_group(PATIENCE_SECONDS)
    agree_on_tiles(tables[torch.distributed.get_rank()])
    candidates = ({"num_warps": 1}, {"num_warps": 4}, {"num_warps": 8})
    answers = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        answers.append(tuning.config_for("scan_walk", (64,), candidates, torch.device("cuda")))
    return answers


@pytest.mark.parametrize(
    ("second", "wanted"),
    [(Table(HOPPER, OTHER), {"num_warps": 4}), (Table(AMPERE, TUNED), {"num_warps": 1})],
    ids=["equal GPUs", "different GPUs"],
)
def test_ranks_launch_what_they_agreed_on_and_their_own_tiles_where_asked_for_determinism(
    second: Table, wanted: dict[str, int]
) -> None:
    for tuned, fixed in run_ranks(agree, [Table(HOPPER, TUNED), second]):
        assert tuned == wanted
        assert fixed == {"num_warps": 1}


def test_products_that_the_table_gives_to_pytorch_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    from amfm.pretrain.startup.arithmetic import describe_products

    config = load_config(Path(__file__).parents[3] / "configs/tiny_cpu.yaml", [])
    assert describe_products(config) == {}
    chosen = TUNED | {"fp8_block_backend": {"TORCH": 1}, "experts_backend torch.bfloat16 64": {"TORCH": 0}}
    monkeypatch.setattr(tuning, "_ADOPTED", [Table(HOPPER, chosen)])
    assert describe_products(config) == {"products_by_torch": ["fp8_block_backend"]}
