"""What Muon is for: more learned from the same tokens than with AdamW at its best rate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.config.schema import OptimizerConfig
from amfm.pretrain.engine.engine import build_engine
from amfm.pretrain.parallel import Parallel, initialize_parallel
from tests.helpers.spawn import run_ranks

ROOT = Path(__file__).parents[4]
STEPS, ROWS, TOKENS = 200, 16, 64
VALIDATION_ROWS = 512
MODEL = {
    "pattern": "*-*-",
    "vocab_size": 256,
    "hidden_size": 96,
    "attention": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "positions": "rope"},
    "feed_forward": {"hidden_size": 384},
}


def read_bytes() -> Tensor:
    """Text that is always there: the program itself, its files in the order of their names."""
    files = sorted(path for room in ("pretrain", "model", "launch") for path in (ROOT / room).rglob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def final_loss(parallel: Parallel, text: Tensor, kind: str, rate: float) -> float:
    """Nats per byte on the text's last tenth after 200 steps of 1,024 bytes from the rest, at a cosine to a tenth."""
    model = HybridModel(ModelConfig.model_validate(MODEL), parallel.groups, seed=0)
    optimizer = OptimizerConfig(learning_rate=rate, kind=kind)
    engine = build_engine(model, optimizer=optimizer, precision="float32", zero_stage=1, parallel=parallel)
    generator = torch.Generator().manual_seed(0)
    end = len(text) * 9 // 10
    meta = PackMeta.one_document_a_row(ROWS, TOKENS)
    for step in range(STEPS):
        starts = torch.randint(0, end - TOKENS - 1, (ROWS, 1), generator=generator)
        rows = text[starts + torch.arange(TOKENS + 1)]
        with engine.accumulate(1):
            loss = engine.forward(rows[:, :-1], meta, rows[:, 1:]).loss
            engine.backward(loss.total / (ROWS * TOKENS))
        share = min(1.0, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))
        engine.step(rate * share)
    engine.wait_for_weights()
    held_out = text[
        torch.randint(end, len(text) - TOKENS - 1, (VALIDATION_ROWS, 1), generator=generator) + torch.arange(TOKENS + 1)
    ]
    meta = PackMeta.one_document_a_row(VALIDATION_ROWS, TOKENS)
    with torch.no_grad():
        loss = engine.module.eval()(held_out[:, :-1], meta, held_out[:, 1:]).loss
    return float(loss.nll_sum) / (VALIDATION_ROWS * TOKENS)


def compare(rates: dict[str, list[float]]) -> dict[str, dict[float, float]]:
    parallel = initialize_parallel(timeout_seconds=600, num_threads=1)
    text = read_bytes()
    return {kind: {rate: final_loss(parallel, text, kind, rate) for rate in each} for kind, each in rates.items()}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_muon_learns_more_than_adamw_at_its_best_rate() -> None:
    (found,) = run_ranks(compare, {"adamw": [2e-3, 4e-3, 8e-3], "muon": [4e-3, 8e-3, 1.6e-2]}, num_ranks=1)
    # Measured: 2.232 with AdamW at 4e-3, 1.782 with Muon at 1.6e-2, 2.046 at 4e-3; differences under 0.02 are noise.
    assert min(found["muon"].values()) < min(found["adamw"].values()) - 0.10
    assert found["muon"][4e-3] < found["adamw"][4e-3], "the same rate already wins"
