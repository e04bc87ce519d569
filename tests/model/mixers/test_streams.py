"""Attention sinks in a stream: a model that read whole rows continues over windows, and keeps its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from tests.helpers.text.plays import TOKENS, play_bytes, train

HEADS: dict[str, Any] = {"num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "positions": "rope", "sinks": True}
# Bytes from here on are further from a row's first than three blocks of the windows reach back to it.
LATE = 48


def model_of(seed: int, window: int | None = None) -> HybridModel:
    tree: dict[str, Any] = {"vocab_size": 256, "hidden_size": 96}
    tree["feed_forward"] = {"hidden_size": 384, "activation": "swiglu"}
    if window is None:
        tree |= {"pattern": "*-*-*-", "attention": HEADS}
    else:
        tree |= {"pattern": "W-W-W-", "mixers": {"window": HEADS | {"window": window}}}
    return HybridModel(ModelConfig.model_validate(tree), single_rank_groups(), seed=seed)


def over_windows(model: HybridModel, window: int) -> HybridModel:
    """The same weights over windows, which hold q, k and v in one matrix."""
    weights = model.state_dict()
    for name in [name for name in weights if name.endswith("q_proj.weight")]:
        place = name.removesuffix("q_proj.weight")
        weights[f"{place}in_proj.weight"] = torch.cat([weights.pop(f"{place}{part}_proj.weight") for part in "qkv"])
        weights[f"{place}out_proj.weight"] = weights.pop(f"{place}o_proj.weight")
    windowed = model_of(0, window)
    windowed.load_state_dict(weights)
    return windowed.eval()


@torch.no_grad()
def late_loss(model: HybridModel, plays: Path) -> float:
    """Nats per late byte of 256 held-out rows."""
    rows = play_bytes(plays)[1][: 256 * (TOKENS + 1)].view(256, TOKENS + 1)
    logits_BTV = model(rows[:, :-1].contiguous(), PackMeta.one_document_a_row(256, TOKENS)).logits_BTV
    return float(functional.cross_entropy(logits_BTV[:, LATE:].flatten(0, 1), rows[:, LATE + 1 :].flatten()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_stream_beyond_the_window_keeps_its_loss_and_uses_its_sinks(plays: Path, seed: int) -> None:
    model = model_of(seed)
    train(model, plays, 300, peak=4e-3, seed=seed)
    whole, stream = late_loss(model, plays), over_windows(model, 16)
    kept = late_loss(stream, plays) - whole
    for name, parameter in stream.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(-1e4)
    without = late_loss(stream, plays) - whole
    # Measured: 0.0096 and 0.0097, without the sinks 0.0166 and 0.0137, of 1.95 and 1.93 over whole rows.
    assert kept < 0.02
    assert without > kept + 0.002
