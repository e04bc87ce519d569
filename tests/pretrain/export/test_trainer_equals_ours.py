"""transformers' Trainer on an export takes the step that our model takes on the same texts: in pieces, packed and padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.model.huggingface.classes import weight_map
from amfm.model.packing import PackMeta
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.inference.weights import Weights, read_weights, write_weights
from tests.pretrain.export.exported_models import random_weights
from tests.pretrain.export.habits.exported import Exported, tokens
from tests.pretrain.export.habits.trainer import train_with_pieces
from tests.pretrain.export.test_habits import OWN

pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")

LEARNING_RATE = 0.1
# Balance losses are not part of an export.
MODEL = OWN | {"moe": OWN["moe"] | {"auxiliary_loss_weight": 0.0, "z_loss_weight": 0.0}}
TEXTS = [tokens(1, length, seed=length)[0] for length in (9, 3, 12, 7, 5, 8, 2, 10)]


def step_of_ours(weights: Weights) -> tuple[float, dict[str, Tensor]]:
    """Loss, and weights after a step of gradient descent, on the texts packed into one row."""
    model = weights.build().train()
    ids_T = torch.cat([torch.full((len(text),), number) for number, text in enumerate(TEXTS)])
    labels_T = torch.cat([torch.cat([text[1:], torch.tensor([-100])]) for text in TEXTS])
    output = model(torch.cat(TEXTS)[None], PackMeta.from_document_ids(ids_T[None]), labels_T[None])
    count = (labels_T != -100).sum()
    (output.loss.total / count).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    return float(output.loss.nll_sum / count), dict(model.state_dict())


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows padded on the right to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)
    short = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [3] * n for row, n in zip(rows, short)]),
        "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in short]),
        "labels": torch.tensor([row["input_ids"] + [-100] * n for row, n in zip(rows, short)]),
    }


@pytest.fixture(scope="module")
def both(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Exported]:
    folder: Path = tmp_path_factory.mktemp("trainer")
    weights = random_weights(data, MODEL)
    (folder / "weights").mkdir()
    write_weights(folder / "weights", weights)
    report = export_checkpoint(folder / "weights", folder / "export", verify=False)
    return read_weights(folder / "weights"), Exported("own", report.path, folder, {"trust_remote_code": True})


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_step_of_trainer_is_ours(both: tuple[Weights, Exported], layout: str, pieces: int) -> None:
    from transformers import DataCollatorWithFlattening

    weights, export = both
    collate: Any = DataCollatorWithFlattening() if layout == "packed" else pad
    rows = [{"input_ids": text.tolist()} for text in TEXTS]
    found = train_with_pieces(export, pieces=pieces, rows=rows, collate=collate)
    loss, after = step_of_ours(weights)
    assert abs(found.loss - loss) <= 1e-5 * loss
    buffers = dict(export.model().named_buffers())
    theirs = weight_map(weights.model, "own").to_ours(found.weights | buffers)
    for name, weight in after.items():
        step = (weight - weights.state[name]).abs().max()
        difference = (theirs[name] - weight).abs().max()
        # Relative to the step: a weight that moves by 0.1 and is off by 1e-6.
        assert difference <= 1e-5 * max(float(step), float(weight.abs().max())), name
