"""What a run of tensor, expert and pipeline ranks saved is one whole model to everything that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.hybrid import HybridModel
from amfm.pretrain.checkpoint.inspect import inspect_checkpoint
from amfm.pretrain.export.average import average
from amfm.pretrain.export.export import LOGIT_TOLERANCE, export_checkpoint
from amfm.pretrain.inference.evaluate import evaluate_checkpoint
from amfm.pretrain.inference.generate import Sampling, generate
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import tiny_config

CUTS = {"parallel__tensor": 2, "parallel__expert": 2, "parallel__pipeline": 2}


def train_both(data: DataConfig, root: str, name: str) -> None:
    settings = CUTS if name == "cut" else {}
    config = tiny_config(data, Path(root, name), train__micro_batch_size=1, train__precision="float32", **settings)
    assert train(config) == 0


@pytest.mark.slow
def test_a_run_of_three_axes_is_exported_evaluated_and_continued(data: DataConfig, tmp_path: Path) -> None:
    run_ranks(train_both, data, str(tmp_path), "one", num_ranks=1)
    run_ranks(train_both, data, str(tmp_path), "cut", num_ranks=4)
    found = inspect_checkpoint(tmp_path / "cut" / "checkpoints" / "step-00000004")
    assert found["ok"] and (found["files"], found["layout"]["axes"]["ep"], found["layout"]["axes"]["pp"]) == (4, 2, 2)
    one, cut = read_weights(tmp_path / "one"), read_weights(tmp_path / "cut")
    assert one.state.keys() == cut.state.keys()
    for name, tensor in one.state.items():
        torch.testing.assert_close(cut.state[name], tensor, rtol=0, atol=2e-5, msg=name)
    assert isinstance(cut.build(), HybridModel)
    merged = average([one, cut], (0.5, 0.5)).state
    for name, tensor in one.state.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5, msg=name)
    report = export_checkpoint(tmp_path / "cut", tmp_path / "export")
    assert report.target == "nemotron_h"
    assert report.max_logit_difference is not None and report.max_logit_difference <= LOGIT_TOLERANCE
    losses = [evaluate_checkpoint(tmp_path / name, max_tokens=2000).loss for name in ("one", "cut")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    texts = [
        "".join(generate(tmp_path / name, "to be", max_new_tokens=8, sampling=Sampling(temperature=0)))
        for name in ("one", "cut")
    ]
    assert texts[0] == texts[1]
