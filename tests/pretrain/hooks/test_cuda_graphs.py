"""Blocks whose passes are replayed train as blocks do: the recorded operations of a CPU stand for a GPU's graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.model.mixers.window import WindowMixer
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.hooks.cuda_graphs import CudaGraphs
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps
from tests.helpers.spawn import run_ranks
from tests.pretrain.hooks.recorded_graph import HostRead, record
from tests.pretrain.tiny_run import MODEL, Trained, collect_weights, read_metrics, tiny_config

ROOT = Path(__file__).parents[3]
# Rows that are long enough to hold several documents each, so that both runs pass the same kernels.
LONG = {"train__sequence_length": 96}
TWO_STEPS = {"train__steps": 2, "schedule__warmup_steps": 1}  # of two micro-batches each
DENSE = {
    "model__pattern": "MG-*M",
    "model__mixers": {"gated_deltanet": {"num_heads": 2, "head_dim": 16}},
    "model__moe": None,
}

# Scores above the limit, which a graph notes in the run's one tensor.
HIGH_SCORES = {"model__initializer_range": 0.5, "qk_clip__limit": 8.0}


def train(
    data: DataConfig,
    directory: Path,
    *,
    graphs: bool,
    stages: Sequence[dict[str, Any]] = (),
    single: list[bool] | None = None,
    **overrides: Any,
) -> tuple[Trained, list[list[int] | tuple[int, ...]]]:
    """Train as configured; and which blocks were captured, each time that any were, or the rows that were compiled for.

    single: gets of each micro-batch of a run with graphs whether no row of it has a boundary.
    """
    captured: list[list[int] | tuple[int, ...]] = []

    class Noting(CudaGraphs):
        def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
            super().before_passes(micro_batches, share)
            if single is not None:
                single.extend(batch.meta.single_document for batch in micro_batches)

        def recompile(self, batch: Any) -> None:
            super().recompile(batch)
            captured.append(tuple(batch.tokens_BT.shape))

        def capture_blocks(self, batch: Any) -> None:
            super().capture_blocks(batch)
            assert self.run.engine.buckets is not None
            self.run.engine.buckets.keep_sums()  # unlike a capture, recording has computed, and added to them
            captured.append(list(self.graphs))

    config = tiny_config(data, directory, **overrides)
    config = RunConfig.model_validate(config.model_dump(mode="json") | {"stages": list(stages)})
    with SignalWatch() as signals:
        run = start_run(config, signals)
        if graphs:
            run.hooks = (Noting(run, record), *run.hooks)
        code = run_steps(run)
        trained = Trained(code, read_metrics(run.directory) if run.parallel.is_main else [], collect_weights(run))
        close_run(run)
    return trained, captured


def assert_equal_to_the_bit(one: Trained, other: Trained) -> None:
    for key in ("loss", "grad_norm"):
        assert one.series(key) == other.series(key)
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def clips(trained: Trained) -> list[dict[str, Any]]:
    """What QK-clip found in each step."""
    return [line["qk_clip"] for line in trained.metrics]


def test_replayed_blocks_train_to_the_bit_as_blocks_do(data: DataConfig, tmp_path: Path) -> None:
    plain, _ = train(data, tmp_path / "plain", graphs=False, **DENSE, **LONG)
    replayed, captured = train(data, tmp_path / "graphs", graphs=True, **DENSE, **LONG)
    assert captured == [[0, 1, 2, 4]], "but attention of PyTorch's, once, before the first of four steps"
    assert_equal_to_the_bit(plain, replayed)
    # A graph reads the memory that it was captured with: stale rows would have the losses of the first micro-batch.
    assert len(set(replayed.series("loss"))) == 4


def train_both(data: DataConfig, directory: Path, overrides: dict[str, Any]) -> list[Trained]:
    return [train(data, directory / str(graphs), graphs=graphs, **overrides)[0] for graphs in (False, True)]


# Sums of whole sequences are the same in every block; with tokens cut, each kind gathers and scatters its own.
@pytest.mark.parametrize(
    ("sequence_parallel", "pattern"), [pytest.param(False, "G-", marks=pytest.mark.slow), (True, "MG-*-")]
)
def test_tensor_ranks_replay_what_they_sum_to_the_bit(
    sequence_parallel: bool, pattern: str, data: DataConfig, tmp_path: Path
) -> None:
    given = {"parallel__tensor": 2, "parallel__sequence_parallel": sequence_parallel, "model__pattern": pattern}
    main, other = run_ranks(train_both, data, tmp_path, DENSE | LONG | given | TWO_STEPS)
    assert_equal_to_the_bit(*main)
    assert len(set(main[1].series("loss"))) == 2
    for name, weight in other[0].weights.items():
        assert torch.equal(weight, other[1].weights[name]), name


def train_experts(data: DataConfig, directory: Path, factor: float | None) -> tuple[list[Trained], Any]:
    """Without and with graphs on expert ranks, and what was captured."""
    given = {"model__pattern": "ME-M", "parallel__expert": 2, "parallel__expert_buffer_factor": factor}
    given |= LONG | TWO_STEPS
    plain, _ = train(data, directory / "plain", graphs=False, **given)
    replayed, captured = train(data, directory / "graphs", graphs=True, **given)
    return [plain, replayed], captured


@pytest.mark.parametrize(
    "factor", [None, pytest.param(1.0, marks=pytest.mark.slow)]
)  # with steps that are computed again
def test_expert_ranks_replay_blocks_between_those_that_send_rows(
    factor: float | None, data: DataConfig, tmp_path: Path
) -> None:
    (main, captured), (other, _) = run_ranks(train_experts, data, tmp_path, factor)
    assert captured == [[0, 2, 3]], "all but experts, whose rows the host counts"
    assert_equal_to_the_bit(*main)
    assert len(set(main[1].series("loss"))) == 2
    for name, weight in other[0].weights.items():
        # Experts and their sums are each rank's own; all else is shared.
        assert torch.equal(weight, other[1].weights[name]), name


@pytest.mark.slow  # sums that stay and are sent: tests/pretrain/engine/test_buckets.py
def test_data_ranks_replay_blocks_and_share_their_sums_to_the_bit(data: DataConfig, tmp_path: Path) -> None:
    main, other = run_ranks(train_both, data, tmp_path, DENSE | LONG)
    assert_equal_to_the_bit(*main)
    assert len(set(main[1].series("loss"))) == 4
    for name, weight in main[1].weights.items():
        assert torch.equal(weight, other[1].weights[name]), name


def test_heads_are_clipped_by_the_scores_that_replays_note(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A window by PyTorch's operations reads no number on a CPU; attention by Triton's is in the interpreter's test below.
    monkeypatch.setattr(WindowMixer, "is_graphable", True)
    window = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 9}
    given = {"model__pattern": "MW-", "model__mixers": {"window": window}, "model__moe": None} | LONG | HIGH_SCORES
    plain, _ = train(data, tmp_path / "plain", graphs=False, **given)
    replayed, captured = train(data, tmp_path / "graphs", graphs=True, **given)
    assert captured == [[0, 1, 2]]
    assert_equal_to_the_bit(plain, replayed)
    assert all(found["clipped_heads"] for found in clips(plain))
    assert clips(replayed) == clips(plain)


def test_rows_of_one_document_are_replayed_as_rows_of_several(data: DataConfig, tmp_path: Path) -> None:
    # Of these short rows some have no boundary, which kernels pass in another form: float32's rounding of a sum, or none.
    given = {"model__pattern": "M-*M", "model__moe": None}
    plain, _ = train(data, tmp_path / "plain", graphs=False, **given)
    single: list[bool] = []
    replayed, _ = train(data, tmp_path / "graphs", graphs=True, single=single, **given)
    assert set(single) == {True, False}, "rows without a boundary were among them"
    assert replayed.series("loss") == pytest.approx(plain.series("loss"), rel=1e-6)


def test_a_stage_of_other_rows_is_captured_again(data: DataConfig, tmp_path: Path) -> None:
    stages = [
        {"name": "short", "steps": 2},
        {"name": "long", "steps": 2, "sequence_length": 144, "micro_batch_size": 1},
    ]
    given = {
        "model__pattern": "M-",
        "model__moe": None,
        "train__sequence_length": 96,
        "train__steps": None,
        "schedule__warmup_steps": 0,
    }
    plain, _ = train(data, tmp_path / "plain", graphs=False, stages=stages, **given)
    replayed, captured = train(data, tmp_path / "graphs", graphs=True, stages=stages, **given)
    assert captured == [[0, 1], (1, 144), [0, 1]], "kernels are compiled before the capture, which could not load them"
    assert_equal_to_the_bit(plain, replayed)


def test_a_block_that_depends_on_the_step_is_not_captured(data: DataConfig, tmp_path: Path) -> None:
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path, model__pattern="M-", model__moe=None), signals)
        vars(run.model.blocks[1].mixer)["set_step"] = lambda step, total_steps, seed: None
        hook = CudaGraphs(run, record)
        run.hooks = (hook, *run.hooks)
        run_steps(run)
        assert list(hook.graphs) == [0]
        close_run(run)


def test_a_block_that_reads_a_number_is_named(data: DataConfig, tmp_path: Path) -> None:
    with SignalWatch() as signals:
        run = start_run(tiny_config(data, tmp_path, model__pattern="M-", model__moe=None), signals)
        mixer = run.model.blocks[1].mixer
        forward = mixer.forward
        vars(mixer)["forward"] = lambda x_BTD, *rest: forward(x_BTD * x_BTD.amax().item(), *rest)
        run.hooks = (CudaGraphs(run, record), *run.hooks)
        with pytest.raises(
            RuntimeError, match=r"block 1 \(-\) could not be captured .* train.cuda_graphs=none"
        ) as error:
            run_steps(run)
        assert isinstance(error.value.__cause__, HostRead)
        close_run(run)


def test_a_cpu_has_no_graphs(data: DataConfig, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, train__cuda_graphs="blocks", train__precision="bf16", kernels__backend="auto")
    with (
        SignalWatch() as signals,
        pytest.raises(ConfigError, match="needs a GPU, which replays the passes, and this run is on a CPU"),
    ):
        start_run(config, signals)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
def test_replayed_kernels_of_triton_train_to_the_bit_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-m", "slow", str(Path(__file__))]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="run by the test above in a process that interprets")
def test_experts_and_attention_by_tritons_kernels_are_replayed_to_the_bit(data: DataConfig, tmp_path: Path) -> None:
    given = {
        "model__pattern": "ME*-",
        "kernels__backend": "triton",
        "train__steps": 2,
        "schedule__warmup_steps": 1,
    }
    given |= LONG | HIGH_SCORES
    plain, _ = train(data, tmp_path / "plain", graphs=False, **given)
    replayed, captured = train(data, tmp_path / "graphs", graphs=True, **given)
    assert captured == [[0, 1, 2, 3]]
    assert_equal_to_the_bit(plain, replayed)
    assert clips(replayed) == clips(plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_of_a_gpu_train_to_the_bit(data: DataConfig, tmp_path: Path) -> None:
    sizes = {"num_heads": 4, "head_dim": 64, "state_size": 64, "num_groups": 1, "chunk_size": 64}
    model = MODEL | {"pattern": "ME*-M", "hidden_size": 128, "mamba": sizes}
    given = {f"model__{name}": value for name, value in model.items()} | {
        "train__sequence_length": 256,
        "train__precision": "bf16",
        "train__deterministic": True,
        "kernels__backend": "triton",
    }
    trained = []
    for graphs in ("none", "blocks"):
        with SignalWatch() as signals:
            run = start_run(tiny_config(data, tmp_path / graphs, train__cuda_graphs=graphs, **given), signals)
            assert any(isinstance(hook, CudaGraphs) for hook in run.hooks) == (graphs == "blocks")
            code = run_steps(run)
            trained.append(Trained(code, read_metrics(run.directory), collect_weights(run)))
            close_run(run)
    assert_equal_to_the_bit(*trained)
