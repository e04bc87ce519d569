"""A flipped bit is found and its rank named: in memory between steps, in an update, in a computation."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.checkpoint.engine_layout import EngineLayout
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints
from amfm.pretrain.hooks.state_watch import StateWatch, digest, judge_replicas
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.run import Run
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import make_engine
from tests.pretrain.checkpoint.toys import run_steps as run_steps_of_toy
from tests.pretrain.tiny_run import read_metrics, tiny_config

VICTIM = 1
SETTINGS: dict[str, Any] = {
    "train__steps": 5,
    "train__micro_batch_size": 1,
    "train__global_batch_size": 12,
    "train__checkpoint_every_steps": 2,
    "health__check_state_every_steps": 1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_every_flipped_bit_changes_a_digest(dtype: torch.dtype) -> None:
    values = torch.arange(37).to(dtype)
    before = int(digest(values))
    words = values.view(torch.uint8)
    for place in range(len(words)):
        for bit in range(8):
            words[place] ^= 1 << bit
            assert int(digest(values)) != before
            words[place] ^= 1 << bit
    assert int(digest(values)) == before
    assert int(digest(values.flip(0))) != before


def test_the_owner_then_the_majority_says_which_replica_is_wrong() -> None:
    key = ("model weights", "a", 0, 4)
    three = [({(0, 1, 2): {key: value}}, {}) for value in (7, 8, 7)]
    assert judge_replicas(three) == {1: ["a [0:4]: model weights differ from those of the other data ranks"]}
    owned = [({(0, 1): {key: value}}, masters) for value, masters in ((7, {}), (8, {key: 8}))]
    assert list(judge_replicas(owned)) == [0]
    two = judge_replicas([({(0, 1): {key: value}}, {}) for value in (7, 8)])
    assert list(two) == [0, 1] and "as many ranks on either side" in two[0][0]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_working_weight_that_is_not_its_rounded_master_is_found_at_the_first_look(stage: int) -> None:
    """Nothing was noted at rest before, and one rank has no replicas: only the master weights tell."""
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    engine = make_engine(parallel, stage=stage, precision="bf16")
    run_steps_of_toy(engine, 0, 1)
    layout = EngineLayout.of(engine)
    StateWatch(layout, parallel).examine(1)
    name, weight = next(iter(engine.module.named_parameters()))
    weight.data.view(-1).view(torch.int16)[0] ^= 1
    with pytest.raises(RuntimeError, match=rf"{name} .*the model weights are not the rounded master weights"):
        StateWatch(layout, parallel).examine(1)


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq", "master"])
def test_a_bit_that_flips_at_rest_is_found_at_the_next_step(kind: str) -> None:
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    engine = make_engine(parallel, stage=1)
    run_steps_of_toy(engine, 0, 1)
    watch = StateWatch(EngineLayout.of(engine), parallel)
    watch.examine(1)
    part = max(watch.layout.parts, key=lambda part: part.master.numel())
    flip(part.master if kind == "master" else engine.adamw.state[part.master][kind])
    with pytest.raises(RuntimeError, match=rf"{'weight' if kind == 'master' else kind} changed in memory"):
        watch.examine_rest(2)


def flip(tensor: torch.Tensor) -> None:
    tensor.detach().view(-1).view(torch.int32)[3] ^= 1 << 7


def flip_at_rest(kind: str) -> Callable[[Run], None]:
    """In memory, between the updates of step 3 and step 4."""

    def hurt(run: Run) -> None:
        part = max(run.saver.layout.parts, key=lambda part: part.master.numel())
        if kind == "working":
            flip(next(run.engine.module.parameters()))
        else:
            flip(part.master if kind == "master" else run.engine.adamw.state[part.master][kind])

    return hurt


def flip_in_update(run: Run) -> None:
    """In what the optimizer writes, at the next step."""

    def hurt(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        handle.remove()
        flip(optimizer.param_groups[0]["params"][0])

    handle = register_optimizer_step_post_hook(hurt)


def flip_in_forward(run: Run) -> None:
    """In one output of one module, once."""

    def hurt(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
            handle.remove()
            output.data[(0,) * output.dim()] += 1.0

    handle = register_module_forward_hook(hurt)


HURTS: dict[str, Callable[[Run], None]] = {
    "working": flip_at_rest("working"),
    "exp_avg": flip_at_rest("exp_avg"),
    "exp_avg_sq": flip_at_rest("exp_avg_sq"),
    "master": flip_at_rest("master"),
    "update": flip_in_update,
    "forward": flip_in_forward,
    "none": lambda run: None,
}


def train_and_hurt(data: DataConfig, folder: str, settings: dict[str, Any], hurts: list[str]) -> dict[str, str]:
    """For each hurt: three steps, a hurt on one rank, and what the run then says."""
    said = {}
    for name in hurts:
        config = tiny_config(data, Path(folder, name), **{**SETTINGS, **settings})
        with SignalWatch() as signals:
            run = start_run(config, signals)
            run.config = config.model_copy(update={"train": config.train.model_copy(update={"stop_after_steps": 3})})
            assert run_steps(run) == 0
            run.config = config
            if run.parallel.rank == VICTIM:
                HURTS[name](run)
            try:
                said[name] = f"code {run_steps(run)}"
            except RuntimeError as error:
                said[name] = str(error)
            close_run(run)
    return said


def check_named(said: list[dict[str, str]], folder: Path, texts: dict[str, str]) -> None:
    host = socket.gethostname()
    for name, text in texts.items():
        for told in said:
            assert told[name].startswith("state is damaged at step "), (name, told[name])
            assert f"rank {VICTIM} on {host}: " in told[name] and text in told[name], (name, told[name])
            assert told[name].count(f" on {host}: ") == 1, (name, told[name])
        left = [path.name for path in list_checkpoints(folder / name / "checkpoints")]
        assert left == ["step-00000003", "step-00000002"], "nothing is saved once state is damaged"


def test_a_flipped_bit_on_one_of_three_ranks_is_named(data: DataConfig, tmp_path: Path) -> None:
    texts = {
        "update": "differ from those of",
        "forward": "gave other bits",
    }  # at rest: the test above, and the slow one
    small = {"train__global_batch_size": 3, "model__pattern": "-", "model__moe": None}
    settings = {"parallel__zero_stage": 0, **small}
    said = run_ranks(train_and_hurt, data, str(tmp_path), settings, list(texts), num_ranks=3)
    check_named(said, tmp_path, texts)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_flipped_bit_on_one_of_two_ranks_is_named_where_zero_spreads(
    data: DataConfig, tmp_path: Path, zero_stage: int
) -> None:
    texts = {
        "exp_avg": "exp_avg changed in memory",
        "exp_avg_sq": "exp_avg_sq changed in memory",
        "master": "weight changed in memory",
        "forward": "gave other bits",
    } | ({"working": "model weights changed in memory"} if zero_stage < 3 else {})
    said = run_ranks(train_and_hurt, data, str(tmp_path), {"parallel__zero_stage": zero_stage}, list(texts))
    check_named(said, tmp_path, texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"parallel__zero_stage": 0, "train__precision": "bf16"},
        {"parallel__zero_stage": 1, "parallel__tensor": 2},
        {"parallel__zero_stage": 2, "parallel__expert": 2, "train__precision": "bf16"},
        {"parallel__zero_stage": 1, "parallel__pipeline": 2, "train__recompute": "full"},
        {"parallel__zero_stage": 3, "parallel__tensor": 2, "parallel__sequence_parallel": True},
    ],
    ids=lambda settings: " ".join(f"{name.split('__')[1]}={value}" for name, value in settings.items()),
)
def test_sound_runs_pass_and_keep_their_losses(data: DataConfig, tmp_path: Path, settings: dict[str, Any]) -> None:
    losses = []
    for every in (None, 1):
        folder = tmp_path / str(every)
        said = run_ranks(
            train_and_hurt,
            data,
            str(folder),
            settings | {"health__check_state_every_steps": every},
            ["none"],
            num_ranks=4,
        )
        assert said == [{"none": "code 0"}] * 4
        losses.append([(line["loss"], line["grad_norm"]) for line in read_metrics(folder / "none")])
    assert losses[0] == losses[1] and len(losses[0]) == 5
