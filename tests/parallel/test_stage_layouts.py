"""A run whose stages have layouts of their own trains as one that never moved."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import DONE, NEXT_LAYOUT
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from amfm.pretrain.train import run_steps
from tests.helpers.spawn import run_ranks
from tests.parallel.layouts import Layout, layout_config
from tests.parallel.models import VARIANTS
from tests.pretrain.tiny_run import MODEL, read_events, read_metrics

STEPS = 2  # of a stage
# Rows of the layouts of consecutive stages, all on one number of ranks.
QUICK: list[dict[str, Any]] = [{"tensor": 2, "sequence_parallel": True, "zero_stage": 2}, {"pipeline": 2}]
MORE: list[dict[str, Any]] = [{"zero_stage": 1}, *QUICK, {"expert": 2}, {"context": 2}]
FOUR: list[dict[str, Any]] = [
    {"context": 2, "tensor": 2, "sequence_parallel": True},
    {"pipeline": 2, "expert": 2, "zero_stage": 2},
    {"zero_stage": 3},
    {"pipeline": 2, "tensor": 2, "schedule": "zero_bubble"},
    {"context": 2, "expert": 4},
    {"expert": 2, "offload_optimizer": True},
    {"tensor": 2, "zero_stage": 0},
]
SMALL: dict[str, Any] = {**MODEL, "pattern": "-", "moe": None}  # where it only has to be saved and loaded


def staged_config(
    data: DataConfig,
    run_dir: Path,
    layouts: list[dict[str, Any]] | None,
    count: int,
    steps: int = STEPS,
    model: dict[str, Any] = VARIANTS["latent"],
) -> RunConfig:
    """A run of this many stages, which are on the ranks as `layouts` say; None: all of them on one rank."""
    # Quick runs have half of the batch, which is not enough for a micro-batch on each of four ranks.
    one_rank = Layout(1, {}, "latent", quick=count == len(QUICK))
    tree = layout_config(one_rank, data, run_dir).model_dump(mode="json", exclude_unset=True)
    tree["train"].pop("steps")
    tree["schedule"] = {"kind": "constant", "warmup_steps": 0}
    tree["model"] = model
    stages: list[dict[str, Any]] = [{"name": f"stage{number}", "steps": steps} for number in range(count)]
    for stage, layout in zip(stages, layouts or []):
        stage |= {"parallel": layout}
    # Another micro-batch and other recomputation need no new layout.
    stages[-1] |= {"micro_batch_size": 1} | ({} if layouts is None else {"recompute": "full"})
    if layouts and layouts[-1].get("schedule") == "zero_bubble":
        stages[-1].pop("recompute")
    return RunConfig.model_validate(tree | {"stages": stages})


def run_layouts(data: DataConfig, run_dir: str, layouts: list[dict[str, Any]] | None, count: int) -> list[int]:
    """Start the run until it is done, as a launcher does; returns the exit codes. Every rank must call this.

    Of two stages each has two steps, of more one: moments that were moved wrongly to the second stage change its
    weights, and so its second loss or the third stage's.
    """
    config = staged_config(data, Path(run_dir), layouts, count, steps=STEPS if count == 2 else 1)
    codes: list[int] = []
    while not codes or codes[-1] == NEXT_LAYOUT:
        with SignalWatch() as signals:
            run = start_run(config, signals)
            codes.append(run_steps(run))
            close_run(run)
    return codes


def check_same_losses(data: DataConfig, root: Path, layouts: list[dict[str, Any]], ranks: int) -> None:
    (codes, *others) = run_ranks(run_layouts, data, str(root / "moved"), layouts, len(layouts), num_ranks=ranks)
    assert codes == [*[NEXT_LAYOUT] * (len(layouts) - 1), DONE]
    assert all(other == codes for other in others)
    assert run_ranks(run_layouts, data, str(root / "whole"), None, len(layouts), num_ranks=1) == [[DONE]]
    moved, whole = read_metrics(root / "moved"), read_metrics(root / "whole")
    assert [line["step"] for line in moved] == list(range(1, len(moved) + 1))
    # float32 sums in another order.
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in moved] == pytest.approx([line[key] for line in whole], rel=1e-5)
    assert [line["stage"] for line in moved] == [line["stage"] for line in whole]
    events = [event["stage"] for event in read_events(root / "moved", "next_layout")]
    assert events == [f"stage{number}" for number in range(1, len(layouts))]


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_stages_of_two_ranks_in_layouts_of_their_own_train_as_one_rank(
    data: DataConfig, tmp_path: Path, layouts: list[dict[str, Any]]
) -> None:
    check_same_losses(data, tmp_path, layouts, 2)


@pytest.mark.slow
def test_stages_of_four_ranks_in_layouts_of_their_own_train_as_one_rank(data: DataConfig, tmp_path: Path) -> None:
    check_same_losses(data, tmp_path, FOUR, 4)


def go_back(data: DataConfig, run_dir: str, layouts: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Damage the last rank's part of the checkpoint at the boundary, and start where the next stage would begin."""
    config = staged_config(data, Path(run_dir), layouts, 2, model=SMALL)
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every_steps": 1})})
    results = []
    for start in range(3):
        with SignalWatch() as signals:
            run = start_run(config, signals)
            built = run.built.parallel.model_dump(exclude_defaults=True)
            results.append((run_steps(run), built))
            close_run(run)
        if start == 0 and run.parallel.is_main:
            last = f"rank-{run.parallel.world_size - 1:05d}.safetensors"
            (Path(run_dir) / "checkpoints" / f"step-{STEPS:08d}" / last).write_bytes(b"cut")
    return results


@pytest.mark.parametrize(
    ("ranks", "target"), [(1, {"zero_stage": 2}), pytest.param(2, {"tensor": 2}, marks=pytest.mark.slow)]
)
def test_a_damaged_checkpoint_at_the_boundary_goes_back_into_the_layout_before_it(
    data: DataConfig, tmp_path: Path, ranks: int, target: dict[str, int]
) -> None:
    found, *_ = run_ranks(go_back, data, str(tmp_path), [{"zero_stage": 1}, target], num_ranks=ranks)
    assert found == [(NEXT_LAYOUT, {}), (NEXT_LAYOUT, {}), (DONE, target)]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_signal_while_the_boundary_is_saved_stops_the_run_there(data: DataConfig, tmp_path: Path) -> None:
    config = staged_config(data, tmp_path, [{"zero_stage": 1}, {"zero_stage": 2}], 2, model=SMALL)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        while run.progress.step < STEPS:
            train_step(run)
        os.kill(os.getpid(), signal.SIGTERM)  # after the last step of the layout, whose reduction has not seen it
        assert run_steps(run) == DONE
        close_run(run)
    assert [event["event"] for event in read_events(tmp_path)][-1] == "signal"
    assert (tmp_path / "checkpoints" / f"step-{STEPS:08d}").is_dir()
