"""A run writes what its routers chose, in the documented format and in the room it is given; a model replays it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.model.packing import PackMeta
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.hooks.trace_choices import read_choices
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL, read_metrics, tiny_config


def traced(data: DataConfig, run_dir: Path, trace: dict[str, Any], **overrides: Any) -> RunConfig:
    config = tiny_config(data, run_dir, **({"model__pattern": "-E"} | overrides))
    return RunConfig.model_validate(config.model_dump(mode="json") | {"trace_choices": trace})


def files(run_dir: Path) -> dict[str, tuple[Tensor, dict[int, Tensor]]]:
    """What was written, by step and rank."""
    found = sorted((run_dir / "choices").glob("step-*/rank-*.safetensors"))
    return {f"{path.parent.name}/{path.stem}": read_choices(path) for path in found}


def test_each_step_that_is_due_is_written_as_routers_chose_with_recomputation_too(
    data: DataConfig, tmp_path: Path
) -> None:
    assert train(traced(data, tmp_path / "run", {"every_steps": 2}, train__recompute="full")) == 0
    found = files(tmp_path / "run")
    assert list(found) == ["step-00000002/rank-00000", "step-00000004/rank-00000"]
    loads = [line["expert_load"] for line in read_metrics(tmp_path / "run")]
    for (tokens_BT, choices), line in zip(found.values(), loads[1::2], strict=True):
        assert tokens_BT.shape == (4, 48) and set(choices) == {1} and choices[1].shape == (4, 48, 2)
        counts = torch.bincount(choices[1].flatten(), minlength=4)
        assert float(counts.max() / counts.double().mean()) == pytest.approx(line["1"], abs=1e-3)


def test_what_was_traced_is_replayed(data: DataConfig, tmp_path: Path) -> None:
    """The router of the last checkpoint has moved since its last step, and the replay does as if it had not."""
    assert train(traced(data, tmp_path / "run", {})) == 0
    tokens_BT, choices = files(tmp_path / "run")["step-00000004/rank-00000"]
    model = read_weights(tmp_path / "run").build()
    meta = replace(PackMeta.one_document_a_row(*tokens_BT.shape), choices=choices)
    counts_E = model(tokens_BT, meta).expert_counts[1]
    assert torch.equal(counts_E, torch.bincount(choices[1].flatten(), minlength=4))


def test_files_keep_to_their_size_the_newest_and_first_rows_first(data: DataConfig, tmp_path: Path) -> None:
    # A sequence of 48 tokens takes 48 * (4 + 2 * 2) = 384 bytes; 0.004 MiB are 4,194.
    assert train(traced(data, tmp_path / "run", {"max_mebibytes": 0.004})) == 0
    assert [name[:13] for name in files(tmp_path / "run")] == ["step-00000003", "step-00000004"]
    sizes = [path.stat().st_size for path in (tmp_path / "run/choices").rglob("*.safetensors")]
    assert sum(sizes) <= 0.004 * 2**20
    assert train(traced(data, tmp_path / "small", {"max_mebibytes": 0.001})) == 0
    ((tokens_BT, _),) = files(tmp_path / "small").values()
    assert 0 < len(tokens_BT) < 4


ONE_STEP: dict[str, Any] = {
    "train__stop_after_steps": 1,
    "train__micro_batch_size": 1,
    "model__pattern": MODEL["pattern"],
}


def train_layouts(data: DataConfig, folder: str, axes: list[str]) -> None:
    for axis in axes:
        assert train(traced(data, Path(folder, axis), {}, **ONE_STEP, **{f"parallel__{axis}": 2})) == 0


def train_alone(data: DataConfig, folder: Path) -> tuple[Tensor, dict[int, Tensor]]:
    assert train(traced(data, folder, {}, **ONE_STEP)) == 0
    (found,) = files(folder).values()
    return found


@pytest.mark.slow
def test_ranks_that_have_all_rows_write_them_once(data: DataConfig, tmp_path: Path) -> None:
    axes = ["tensor", "pipeline"]
    run_ranks(train_layouts, data, str(tmp_path), axes, num_ranks=2)
    tokens_BT, choices = train_alone(data, tmp_path / "alone")
    for axis in axes:
        ((own_BT, own),) = files(tmp_path / axis).values()
        assert torch.equal(own_BT, tokens_BT) and torch.equal(own[1], choices[1])


def test_ranks_write_their_own_rows_and_blocks_once(data: DataConfig, tmp_path: Path) -> None:
    run_ranks(train_layouts, data, str(tmp_path), ["context"], num_ranks=2)
    tokens_BT, choices = train_alone(data, tmp_path / "alone")
    rows = zip(*(files(tmp_path / "context")[f"step-00000001/rank-0000{rank}"] for rank in (0, 1)), strict=True)
    tokens, blocks = rows
    meta = PackMeta.one_document_a_row(*tokens_BT.shape)
    for rank in (0, 1):
        take = meta.cut(rank, 2).segments.take
        assert torch.equal(tokens[rank], take(tokens_BT)) and torch.equal(blocks[rank][1], take(choices[1]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"train__compile": True},
            "trace_choices: reads choices in forward passes, which train.compile runs without Python",
        ),
        (
            {"model__pattern": "M*-", "model__moe": None},
            "trace_choices: has nothing to write: no block of model.pattern",
        ),
    ],
)
def test_a_trace_of_nothing_or_of_compiled_passes_is_refused(
    data: DataConfig, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(traced(data, tmp_path, {}, **overrides), 1)
