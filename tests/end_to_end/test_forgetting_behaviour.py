"""What forgetting is for: where tokens get new names, blocks that have met many embeddings learn another one sooner."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from amfm_synthetic.rows import SyntheticSettings
from torch import Tensor

from amfm.data_pipeline.store.manifest import Split
from amfm.model.hybrid import HybridModel
from amfm.model.init import initial_values, named_seed
from amfm.model.packing import PackMeta
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.train import train

CONFIG = Path(__file__).parents[2] / "configs" / "probes" / "mqar.yaml"
STEPS, EVERY, LENGTH, ROWS = 480, 60, 12, 32
# Four pairs and four questions, of 16 keys and 16 values; head and embedding are one table, and begin again together.
SETTINGS = [
    "run.tensorboard=false",
    *(f"train.{name}" for name in ("num_threads=1", f"steps={STEPS}", f"sequence_length={LENGTH}")),
    *(f"train.{name}" for name in (f"micro_batch_size={ROWS}", f"global_batch_size={ROWS}")),
    "data.synthetic={task: mqar, num_pairs: 4, num_keys: 16, num_values: 16}",
    "model.vocab_size=33",
    "model.tie_embeddings=true",
    "model.hidden_size=48",
    "model.initializer_range=0.144",
    "model.attention={num_heads: 2, num_kv_heads: 2, head_dim: 24, positions: rope}",
    "schedule={kind: constant, warmup_steps: 20}",
]


def rows_of(config: RunConfig, split: Split, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [count, LENGTH] of rows that no training saw in this order."""
    reader = SyntheticSettings.from_config(config.data, split=split, sequence_length=LENGTH, seed=99).open_reader()
    rows = [reader.make_synthetic_row(number, LENGTH) for number in range(first, first + count)]
    tokens_BT, labels_BT = (np.stack([getattr(row, name) for row in rows]) for name in ("tokens_T", "labels_T"))
    return torch.from_numpy(tokens_BT).long(), torch.from_numpy(labels_BT).long()


@torch.no_grad()
def accuracy_of(model: HybridModel, config: RunConfig) -> float:
    """Share of right answers on 128 held-out rows."""
    tokens_BT, labels_BT = rows_of(config, "validation", 0, 128)
    found_BT = model.eval()(tokens_BT, PackMeta.one_document_a_row(128, LENGTH)).logits_BTV.argmax(-1)
    return float((found_BT == labels_BT)[labels_BT >= 0].float().mean())


def accuracy_under_new_names(config: RunConfig, steps: int) -> float:
    """Share of right answers after this many steps of only a new embedding."""
    assert train(config) == 0
    model = read_weights(config.run.dir).build().requires_grad_(False)
    weight = model.get_parameter("embedding.weight").requires_grad_(True)
    seed = named_seed(config.train.seed, "new names")
    weight.data.copy_(initial_values("embedding.weight", tuple(weight.shape), config.model, seed))
    optimizer = torch.optim.AdamW([weight], lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95))
    model.train()
    for step in range(1, steps + 1):
        tokens_BT, labels_BT = rows_of(config, "train", step * ROWS, ROWS)
        loss = model(tokens_BT, PackMeta.one_document_a_row(ROWS, LENGTH), labels_BT).loss.total
        (loss / (labels_BT >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return accuracy_of(model, config)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_blocks_that_forgot_answer_under_new_names_after_fewer_steps(seed: int, tmp_path: Path) -> None:
    found = {}
    for name, forget in (("kept", []), ("forgot", [f"forget={{every_steps: {EVERY}, until_step: {STEPS - EVERY}}}"])):
        overrides = [*SETTINGS, f"train.seed={seed}", f"run.dir={tmp_path / name}", *forget]
        found[name] = accuracy_under_new_names(load_config(CONFIG, overrides), 40)
    print(f"\nseed {seed}: {found}")
    assert found["forgot"] >= found["kept"] + 0.2
