"""A run of megatron-core moves here in its middle and back, and all three programs' losses are one curve.

Every row is the same text, because the programs read rows in other orders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amfm_foreign_states.adopt import import_state
from amfm_foreign_states.megatron.write import export_megatron
from amfm_foreign_states.state import WrittenRun
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from amfm.data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.store import TokenStore
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.parallel import initialize_parallel
from tests.examples.foreign_states.test_megatron import MOE
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny_store import run_in_process
from tests.pretrain.tiny_run import MODEL, Trained, tiny_config, train_and_collect

LENGTH, BATCH = 48, 2
SETTINGS: dict[str, Any] = {**MOE, "moe_layer_freq": [0, 1]}


def write_text(prefix: Path) -> None:
    """A dataset of 64 documents of one row each, all alike."""
    draw = np.random.default_rng(7)
    document = [*draw.integers(4, 400, size=LENGTH - 1).tolist(), 2]
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(64):
        builder.add_document(torch.tensor(document), [LENGTH])
    builder.finalize(f"{prefix}.idx")


def train_there(prefix: str, folder: str, steps: int, saved_at: int) -> list[float]:
    """Losses of an unbroken run, which saves on its way."""
    from tests.examples.foreign_states import megatron_training as megatron

    initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    losses = []
    with megatron.models.on_cpu(), megatron.WithoutGpu():
        run = megatron.Training(SETTINGS, prefix)
        for _ in range(steps):
            losses.append(run.step())
            if run.done == saved_at:
                run.save(Path(folder) / f"iter_{saved_at:07d}")
    return losses


def go_on_there(prefix: str, folder: str, steps: int) -> list[float]:
    """Losses of a run that begins from a checkpoint."""
    from tests.examples.foreign_states import megatron_training as megatron

    initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    with megatron.models.on_cpu(), megatron.WithoutGpu():
        run = megatron.Training(SETTINGS, prefix)
        run.load(Path(folder))
        return [run.step() for _ in range(steps)]


def same_run(data: DataConfig, directory: Path, steps: int) -> RunConfig:
    """The configuration that continues megatron-core's run here."""
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope"}
    moe = {**MODEL["moe"], "activation": "swiglu", "auxiliary_loss_weight": 0.0, "z_loss_weight": 0.0}
    model = {"vocab_size": 448, "hidden_size": 32, "pattern": "*-*E", "attention": attention, "moe": moe}
    model |= {"feed_forward": {"hidden_size": 48, "activation": "swiglu"}, "norm_epsilon": 1e-5}
    tree = tiny_config(data, directory).model_dump(mode="json") | {"model": model}
    tree["train"] |= {"steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH, "sequence_length": LENGTH}
    tree["train"] |= {"validate_every_steps": None}
    tree["optimizer"] |= {"learning_rate": 3e-3, "beta2": 0.95, "weight_decay": 0.1, "clip_grad_norm": 1.0}
    tree["schedule"] = {"kind": "cosine", "warmup_steps": 4, "decay_end_step": 40, "min_ratio": 0.1}
    return RunConfig.model_validate(tree)


@pytest.mark.slow
def test_a_run_of_megatron_core_moves_here_and_back_without_a_step_in_its_losses(
    data: DataConfig, tmp_path: Path
) -> None:
    prefix, back = tmp_path / "web", tmp_path / "back"
    write_text(prefix)
    unbroken = run_ranks(train_there, str(prefix), str(tmp_path / "there"), 25, 10, num_ranks=1)[0]
    store = DataConfig(
        store=str(tmp_path / "store"),
        sources=(SourceConfig(name="web", paths=(str(prefix),)),),
        tokenizer=TokenizerConfig(model=str(TokenStore.open(data.text_store()).tokenizer_path)),
        prepare=PrepareConfig(chunk_tokens=512),
        megatron_split="100,0,0",
        validation_fraction=0.0,
        mask_document_boundaries=False,
        num_workers=0,
    )
    prepare(store, runner=run_in_process)
    # Step k here has the rate of iteration k + 1 there: ten iterations count as nine steps.
    config = same_run(store, tmp_path / "unused", steps=19)
    imported = import_state(tmp_path / "there" / "iter_0000010", back, config, step=9)
    assert isinstance(imported, WrittenRun)
    moved = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(back)})})
    here: Trained = run_ranks(train_and_collect, moved, num_ranks=1)[0]
    assert here.series("loss") == pytest.approx(unbroken[10:20], abs=1e-5)
    exported = export_megatron(back, tmp_path / "again", is_gpt=True)
    folder = exported.path / f"iter_{exported.step:07d}"
    again = run_ranks(go_on_there, str(prefix), str(folder), 5, num_ranks=1)[0]
    assert again == pytest.approx(unbroken[20:], abs=1e-5)
    assert unbroken[-1] < unbroken[10] < unbroken[0]  # it learned
