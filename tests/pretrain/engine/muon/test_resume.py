"""A checkpoint of a Muon run continues with bitwise identical results, and under another layout from the same numbers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from amfm_foreign_states.universal import export_universal

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.inspect import diff_checkpoints, inspect_checkpoint, read_full_state
from amfm.pretrain.config.schema import OptimizerConfig, ParallelConfig
from amfm.pretrain.engine.engine import ZeroEngine, build_engine
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import load, save
from tests.pretrain.tiny_run import MODEL

RATE = 1e-2
KIND = {"optimizer__kind": "muon"}


def make_engine(zero_stage: int, seed: int, rule: str = "muon", **axes: int) -> ZeroEngine:
    section = ParallelConfig(zero_stage=zero_stage, **axes)
    parallel = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    model = HybridModel(ModelConfig.model_validate(MODEL | {"pattern": "ME"}), parallel.groups, seed=seed)
    optimizer = OptimizerConfig(learning_rate=RATE, kind="muon", muon={"rule": rule})
    return build_engine(model, optimizer=optimizer, precision="float32", zero_stage=zero_stage, parallel=parallel)


def run_steps(engine: ZeroEngine, first: int, last: int) -> list[tuple[float, float]]:
    """Step on tokens that depend only on the step; (loss, gradient norm) a step."""
    results = []
    meta = PackMeta.one_document_a_row(2, 16)
    for step in range(first, last):
        tokens_BT = torch.randint(0, 448, (2, 16), generator=torch.Generator().manual_seed(step))
        with engine.accumulate(1):
            output = engine.forward(tokens_BT, meta, tokens_BT)
            engine.backward(output.loss.total / 64)
        results.append((float(output.loss.nll_sum), engine.step(RATE).grad_norm))
    return results


def save_and_go_on(folder: str, rule: str) -> list[Any]:
    """Three steps straight; two, a checkpoint and one more from it; and the checkpoint saved again by another layout."""
    root, kind = Path(folder), {**KIND, "optimizer__muon": {"rule": rule}}
    engine = make_engine(1, 0, rule, tensor=2)
    straight = run_steps(engine, 0, 2)
    save(root / "first", 2, engine, **kind)
    straight += run_steps(engine, 2, 4)
    save(root / "straight", 4, engine, **kind)
    again = make_engine(1, 5, rule, tensor=2)
    assert load(root / "first", again, **kind) is not None
    resumed = run_steps(again, 2, 4)
    save(root / "resumed", 4, again, **kind)
    other = make_engine(2, 5, rule)
    assert load(root / "first", other, **kind) is not None
    save(root / "moved", 2, other, **kind)
    return [straight[2:], resumed]


def save_all(folder: str, rules: list[str]) -> dict[str, list[Any]]:
    return {rule: save_and_go_on(f"{folder}/{rule}", rule) for rule in rules}


def test_a_run_goes_on_bit_for_bit_and_moves_between_layouts(tmp_path: Path) -> None:
    runs = run_ranks(save_all, str(tmp_path), ["muon", "normuon"], num_ranks=2)[0]
    for rule, (straight, resumed) in runs.items():
        assert straight == resumed
        folder = tmp_path / rule
        assert diff_checkpoints(folder / "straight/step-00000004", folder / "resumed/step-00000004")["same"]
        found = diff_checkpoints(folder / "first/step-00000002", folder / "moved/step-00000002")
        assert found["same"], found
    groups, kept = (
        inspect_checkpoint(tmp_path / rule / "first/step-00000002")["parameters"]["by_group"] for rule in runs
    )
    assert kept == {"matrices": groups["muon"], "decay": groups["decay"], "no_decay": groups["no_decay"]}
    state = read_full_state(tmp_path / "normuon/first/step-00000002")
    assert not any(name.startswith("optimizer/") for name in state), "no part of the model"
    assert set(groups) == {"muon", "decay", "no_decay"} and groups["muon"] > groups["no_decay"]
    with pytest.raises(ValueError, match=r"trained with optimizer.kind=muon.*AdamW's moments.*--format huggingface"):
        export_universal(tmp_path / "muon/first/step-00000002", tmp_path / "out")


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
