"""A checkpoint of a Muon run continues bit for bit, and under another layout from the same numbers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.inspect import diff_checkpoints, inspect_checkpoint
from amfm.pretrain.config.schema import OptimizerConfig, ParallelConfig
from amfm.pretrain.engine.engine import ZeroEngine, build_engine
from amfm.pretrain.exchange.universal import export_universal
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import load, save
from tests.pretrain.tiny_run import MODEL

RATE = 1e-2
KIND = {"optimizer__kind": "muon"}


def make_engine(zero_stage: int, seed: int, **axes: int) -> ZeroEngine:
    section = ParallelConfig(zero_stage=zero_stage, **axes)
    parallel = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    model = HybridModel(ModelConfig.model_validate(MODEL), parallel.groups, seed=seed)
    optimizer = OptimizerConfig(learning_rate=RATE, kind="muon")
    return build_engine(model, optimizer=optimizer, precision="float32", zero_stage=zero_stage, parallel=parallel)


def run_steps(engine: ZeroEngine, first: int, last: int) -> list[tuple[float, float]]:
    """Step on tokens that depend on the step alone; (loss, gradient norm) a step."""
    results = []
    meta = PackMeta.one_document_a_row(2, 16)
    for step in range(first, last):
        tokens_BT = torch.randint(0, 448, (2, 16), generator=torch.Generator().manual_seed(step))
        with engine.accumulate(1):
            output = engine.forward(tokens_BT, meta, tokens_BT)
            engine.backward(output.loss.total / 64)
        results.append((float(output.loss.nll_sum), engine.step(RATE).grad_norm))
    return results


def save_and_go_on(folder: str) -> list[Any]:
    """Three steps straight; two, a checkpoint and one more from it; and the checkpoint saved again by another layout."""
    root = Path(folder)
    engine = make_engine(1, 0, tensor=2)
    straight = run_steps(engine, 0, 2)
    save(root / "first", 2, engine, **KIND)
    straight += run_steps(engine, 2, 4)
    save(root / "straight", 4, engine, **KIND)
    again = make_engine(1, 5, tensor=2)
    assert load(root / "first", again, **KIND) is not None
    resumed = run_steps(again, 2, 4)
    save(root / "resumed", 4, again, **KIND)
    other = make_engine(2, 5)
    assert load(root / "first", other, **KIND) is not None
    save(root / "moved", 2, other, **KIND)
    return [straight[2:], resumed]


def test_a_run_goes_on_bit_for_bit_and_moves_between_layouts(tmp_path: Path) -> None:
    straight, resumed = run_ranks(save_and_go_on, str(tmp_path), num_ranks=2)[0]
    assert straight == resumed
    assert diff_checkpoints(tmp_path / "straight/step-00000004", tmp_path / "resumed/step-00000004")["same"]
    found = diff_checkpoints(tmp_path / "first/step-00000002", tmp_path / "moved/step-00000002")
    assert found["same"], found
    groups = inspect_checkpoint(tmp_path / "first/step-00000002")["parameters"]["by_group"]
    assert set(groups) == {"muon", "decay", "no_decay"} and groups["muon"] > groups["no_decay"]
    with pytest.raises(ValueError, match=r"trained with optimizer.kind=muon.*AdamW's moments.*--format huggingface"):
        export_universal(tmp_path / "first/step-00000002", tmp_path / "out")


def refuse_other_kinds(folder: str) -> list[str]:
    engine = make_engine(1, 0)
    save(Path(folder), 1, engine, **KIND)
    texts = []
    for changes in ({}, {**KIND, "optimizer__muon": {"rounds": 6}}):
        with pytest.raises(ValueError) as error:
            load(Path(folder), engine, **changes)
        texts.append(str(error.value))
    return texts


def test_another_kind_or_other_settings_are_refused_on_resume() -> None:
    with TemporaryDirectory() as folder:
        (kind, settings) = run_ranks(refuse_other_kinds, folder, num_ranks=1)[0]
    assert "optimizer.kind: the checkpoint has 'muon', this run has 'adamw'" in kind
    assert "run.initial_weights set to this run's directory" in kind
    assert "optimizer.muon" in settings and "Restore the value" in settings and "initial_weights" not in settings
