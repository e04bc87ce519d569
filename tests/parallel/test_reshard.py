"""A run that moves to another layout continues as a run that was always there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.checkpoint.save import save_checkpoint
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.helpers.spawn import run_ranks
from tests.parallel.layouts import Layout, layout_config
from tests.pretrain.tiny_run import read_events, read_metrics

SAVED, STEPS = 2, 4
# Two layouts add in another order; from equal states two steps of float32 stay within this, relative to the largest.
TOLERANCE = 1e-5


SETTINGS = {"train__steps": STEPS, "train__checkpoint_every_steps": SAVED}


def layout(num_ranks: int, precision: str = "float32", **parallel: Any) -> Layout:
    """The model with latent experts and tied embeddings, which a pipeline holds on its first and last stage."""
    return Layout(num_ranks, parallel, "latent", SETTINGS | {"train__precision": precision})


def muon(num_ranks: int, **parallel: Any) -> Layout:
    """The same model with matrices that Muon steps."""
    return Layout(num_ranks, parallel, "muon", SETTINGS)


def ngrams(num_ranks: int, **parallel: Any) -> Layout:
    """The model whose tables tensor ranks cut by columns."""
    return Layout(num_ranks, parallel, "ngrams", SETTINGS)


LAYOUTS = {
    "one": layout(1),
    "one_bf16": layout(1, "bf16"),
    "one_zero3": layout(1, zero_stage=3),
    "data2": layout(2, zero_stage=2),
    "data2_offload": layout(2, zero_stage=2, offload_optimizer=True),
    "context2": layout(2, context=2),
    "context2_tensor2": layout(4, context=2, tensor=2, sequence_parallel=True, zero_stage=2),
    "context2_expert2_pipeline2": layout(4, context=2, expert=2, pipeline=2),
    "data4_zero3": layout(4, zero_stage=3),
    "tensor2": layout(2, tensor=2),
    "tensor2_zero0": layout(2, tensor=2, zero_stage=0),
    "tensor2_expert2_bf16": layout(4, "bf16", tensor=2, expert=2, zero_stage=2),
    "tensor4": layout(4, tensor=4, sequence_parallel=True, zero_stage=2),
    "expert2": layout(2, expert=2, zero_stage=2),
    "expert4": layout(4, expert=4),
    "tensor2_expert2_cut": layout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2),
    "pipeline2": layout(2, pipeline=2),
    "pipeline2_interleaved": layout(2, pipeline=2, schedule="interleaved", virtual_stages=2, zero_stage=2),
    "pipeline2_expert2": layout(4, pipeline=2, expert=2, zero_stage=2),
    "pipeline2_tensor2": layout(4, pipeline=2, tensor=2),
    "muon": muon(1),
    "muon_zero3": muon(2, zero_stage=3),
    "muon_tensor2": muon(2, tensor=2),
    "muon_expert2": muon(2, expert=2, zero_stage=2),
    "muon_zero0": muon(2, zero_stage=0),
    "ngrams": ngrams(1),
    "ngrams_tensor2": ngrams(2, tensor=2, sequence_parallel=True),
    "pipeline2_tensor2_expert2": layout(8, pipeline=2, tensor=2, sequence_parallel=True, expert=2),
}
# The same with half the batch.
LAYOUTS |= {f"{name}_quick": replace(LAYOUTS[name], quick=True) for name in ("expert2", "tensor2")}
QUICK = [("expert2_quick", "tensor2_quick")]
SLOW = [
    ("pipeline2", "expert2"),
    ("one", "pipeline2"),
    ("tensor2", "one"),
    ("one", "pipeline2_tensor2"),
    ("pipeline2_tensor2", "expert4"),
    ("expert4", "tensor2_expert2_cut"),
    ("tensor2_expert2_cut", "pipeline2_expert2"),
    ("pipeline2_expert2", "data4_zero3"),
    ("data4_zero3", "tensor2_expert2_cut"),
    ("expert2", "expert4"),
    ("expert4", "expert2"),
    ("data2", "context2"),
    ("context2", "context2_expert2_pipeline2"),
    ("context2_expert2_pipeline2", "context2_tensor2"),
    ("context2_tensor2", "tensor2_expert2_cut"),
    ("tensor4", "data2_offload"),
    ("data2_offload", "pipeline2_interleaved"),
    ("pipeline2_interleaved", "tensor4"),
    ("tensor2_expert2_cut", "one_zero3"),
    ("one_zero3", "tensor2_expert2_cut"),
]
MUON = [
    ("muon_tensor2", "muon"),
    ("muon", "muon_expert2"),
    ("muon_expert2", "muon_zero3"),
    ("muon_zero3", "muon_zero0"),
    ("muon_zero0", "muon_tensor2"),
]
NGRAMS = [("ngrams", "ngrams_tensor2"), ("ngrams_tensor2", "ngrams")]
EIGHT = [("expert4", "pipeline2_tensor2_expert2"), ("pipeline2_tensor2_expert2", "data2")]
PRECISIONS = [("one_bf16", "tensor2_zero0"), ("expert2", "one_bf16"), ("tensor2_expert2_bf16", "pipeline2")]


@dataclass(frozen=True)
class Course:
    """What a run's last steps were, on the main rank: loss and gradient norm a step; and what it said on resuming."""

    losses: list[float]
    grad_norms: list[float]
    remarks: list[str]


def follow(
    data: DataConfig, place: Path, name: str, again: Path | None = None, stop: int | None = None
) -> Course | None:
    """Train to the end or to `stop` from whatever the run directory holds; first save what was loaded `again`, elsewhere."""
    layout = LAYOUTS[name]
    config = layout_config(replace(layout, settings=layout.settings | {"train__stop_after_steps": stop}), data, place)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        if again is not None:
            save_checkpoint(
                again, run.progress.step, run.engine, state={}, config=config, identities=run.identities, keep_last=2
            )
        code = run_steps(run)
        close_run(run)
    assert code == 0
    if not run.parallel.is_main:
        return None
    lines = [line for line in read_metrics(place) if line["step"] > SAVED]
    remarks = [event["text"] for event in read_events(place, "resume")]
    return Course([line["loss"] for line in lines], [line["grad_norm"] for line in lines], remarks)


def run_straight(data: DataConfig, root: str, names: list[str], targets: list[str]) -> dict[str, Course | None]:
    """Targets of a move to the end, others to the checkpoint from which they move."""
    return {name: follow(data, Path(root, name), name, stop=None if name in targets else SAVED) for name in names}


def run_moved(data: DataConfig, root: str, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Course | None]:
    results = {}
    for source, target in pairs:
        name = f"{source}-{target}"
        results[source, target] = follow(data, Path(root, name), target, Path(root, f"again-{name}"))
    return results


def by_ranks(names: list[str]) -> dict[int, list[str]]:
    """Layouts by their number of ranks: those of one number share their processes."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(LAYOUTS[name].num_ranks, []).append(name)
    return groups


def move_all(data: DataConfig, root: Path, pairs: list[tuple[str, str]]) -> None:
    """Run every layout of the pairs straight and every pair moved, and compare each moved run with its target's own."""
    straight: dict[str, Course] = {}
    for ranks, names in by_ranks(list(dict.fromkeys(name for pair in pairs for name in pair))).items():
        targets = [target for _, target in pairs]
        straight |= run_ranks(run_straight, data, str(root), names, targets, num_ranks=ranks)[0]
    for source, target in pairs:
        checkpoint = f"checkpoints/step-{SAVED:08d}"
        shutil.copytree(root / source / checkpoint, root / f"{source}-{target}" / checkpoint)
    moved: dict[tuple[str, str], Course] = {}
    for ranks, names in by_ranks([target for _, target in pairs]).items():
        own = [pair for pair in pairs if pair[1] in names]
        moved |= run_ranks(run_moved, data, str(root), own, num_ranks=ranks)[0]
    for pair, course in moved.items():
        check_loaded_exactly(root, *pair)
        check_same_course(pair, course, straight[pair[1]])


def check_loaded_exactly(root: Path, source: str, target: str) -> None:
    """Weights, moments, counters, group settings and buffers, saved again after loading, are the source's bitwise."""
    name = f"step-{SAVED:08d}"
    difference = diff_checkpoints(root / source / "checkpoints" / name, root / f"again-{source}-{target}" / name)
    for found in ("tensors", "only_in_first", "only_in_second", "groups", "optimizer_steps"):
        assert not difference[found], (source, target, difference[found])


def check_same_course(pair: tuple[str, str], moved: Course, straight: Course) -> None:
    source, target = (LAYOUTS[name] for name in pair)
    assert len(moved.losses) == STEPS - SAVED
    if source == target:
        assert (moved.losses, moved.grad_norms) == (straight.losses, straight.grad_norms), pair
    elif source.settings == target.settings:  # another precision goes another way
        assert moved.losses == pytest.approx(straight.losses, rel=TOLERANCE), pair
        assert moved.grad_norms == pytest.approx(straight.grad_norms, rel=TOLERANCE), pair
        assert any(text.startswith("parallel.") for text in moved.remarks), "a change of layout is written down"


@pytest.mark.slow
def test_runs_move_between_layouts_of_two_ranks(data: DataConfig, tmp_path: Path) -> None:
    """Quick: tests/parallel/test_stage_layouts.py, whose runs move from tensor ranks to a pipeline; what was loaded and is saved
    again, bitwise, in tests/pretrain/engine/muon/test_resume.py and engine/test_adamw.py; every layout reads every
    other's files in tests/pretrain/checkpoint/test_placement.py.
    """
    move_all(data, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pairs",
    [SLOW, MUON, NGRAMS, EIGHT, PRECISIONS],
    ids=["up to four ranks", "Muon", "n-gram memory", "eight ranks", "precisions"],
)
def test_runs_move_between_layouts(data: DataConfig, tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    move_all(data, tmp_path, pairs)


@pytest.mark.slow
def test_the_same_layout_goes_on_bit_for_bit(data: DataConfig, tmp_path: Path) -> None:
    move_all(data, tmp_path, [(name, name) for name, layout in LAYOUTS.items() if not layout.quick])
