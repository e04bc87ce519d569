"""QK-clip: a head's scores come down to the limit exactly, on every layout alike, and nothing but a step's scores decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.hooks.qk_clip import HeadMaxima
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from tests.helpers.spawn import run_ranks
from tests.helpers.spoiled_gradient import spoil_gradient
from tests.parallel.layouts import gather_weights
from tests.pretrain.tiny_run import Trained, tiny_config, train_and_collect

# Wide initial values: scores of 10 to 60, where the logarithm of all keys is below 4. Of two key heads each of two tensor
# ranks has one, and the window's only one is a copy on both.
MODEL: dict[str, Any] = {
    "pattern": "*W+(M&*)-",
    "vocab_size": 448,
    "hidden_size": 32,
    "initializer_range": 0.5,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope", "bias": True},
    "mamba": {"num_heads": 4, "head_dim": 16, "state_size": 16, "num_groups": 2, "chunk_size": 16},
    "feed_forward": {"hidden_size": 48},
    "mixers": {
        "window": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 8, "window": 9, "sinks": True, "bias": True},
        "mla": {
            "num_heads": 4,
            "latent_size": 12,
            "query_latent_size": 10,
            "nope_head_dim": 6,
            "rope_head_dim": 4,
            "value_head_dim": 5,
            "positions": "rope",
        },
    },
}
LIMIT = 8.0
MUON = {"optimizer__kind": "muon"}
ADAMW = {
    "optimizer__epsilon": 1e-5
}  # or a step of a gradient near 0 is as large as any, whatever sign rounding gives it


def clipped(data: DataConfig, folder: Path, limit: float | None = LIMIT, **settings: Any) -> Any:
    section = {} if limit is None else {"qk_clip": {"limit": limit}}
    config = tiny_config(data, folder, optimizer__learning_rate=1e-3, **settings)
    tree = config.model_dump(mode="json", exclude_unset=True) | {"model": MODEL} | section
    return type(config).model_validate(tree)


def test_scores_of_high_heads_come_to_the_limit_and_others_keep_every_bit() -> None:
    """With scores so large that the log-sum-exp of a query is its largest score, in every kind of softmax mixer."""
    torch.manual_seed(0)
    model = HybridModel(
        ModelConfig.model_validate(MODEL | {"initializer_range": 2.0}), single_rank_groups(), backend="torch"
    ).double()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            parameter.data.normal_(std=4.0)
    heads = HeadMaxima(model, RankGroup(0, 1), torch.device("cpu"))
    assert [int(part) for part in heads.sizes.values()] == [4, 4, 4, 4]
    mixers = [mixer for mixer, _ in heads.mixers]
    ids_BT = torch.tensor([0] * 5 + [1] * 12).expand(2, -1)
    meta = PackMeta.from_document_ids(ids_BT)
    x_BTD = torch.randn(2, 17, 32, dtype=torch.float64)
    for mixer in mixers:
        mixer(x_BTD, meta)
    before = heads.of_all_ranks()
    limit = float(before.median())
    factors = torch.where(before > limit, limit / before, 1.0)
    for mixer, place in heads.mixers:
        for weight, rows in mixer.scale_logits(factors[place]).items():
            weight.data.mul_(rows if weight.dim() == 1 else rows[:, None])
    heads.flat.fill_(-torch.inf)
    for mixer in mixers:
        mixer(x_BTD, meta)
    after = heads.of_all_ranks()
    torch.testing.assert_close(after, before.clamp(max=limit), rtol=1e-9, atol=0)
    assert torch.equal(after[before <= limit], before[before <= limit])


@pytest.mark.parametrize("settings", [ADAMW, pytest.param(MUON, marks=pytest.mark.slow)], ids=["adamw", "muon"])
def test_a_cut_run_gives_the_same_bits_and_says_what_it_clipped(
    data: DataConfig, tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole = train_and_collect(clipped(data, tmp_path / "whole", **settings))
    for stop in (2, 4):
        cut = train_and_collect(clipped(data, tmp_path / "cut", **settings, train__stop_after_steps=stop))
    assert all(torch.equal(cut.weights[name], weight) for name, weight in whole.weights.items())
    found = [line["qk_clip"] for line in whole.metrics]
    assert [list(line["max_logit"]) for line in found] == [["0", "1", "2", "3"]] * 4
    assert found[0]["clipped_heads"] > 4
    # The first step left every head at the limit, from where a step of this rate takes it a little.
    assert max(found[0]["max_logit"].values()) > 2 * LIMIT
    assert max(found[1]["max_logit"].values()) < 1.3 * LIMIT


def test_a_limit_that_no_head_reaches_changes_no_bit(data: DataConfig, tmp_path: Path) -> None:
    two = {"train__stop_after_steps": 2}
    without = train_and_collect(clipped(data, tmp_path / "without", None, **two))
    high = train_and_collect(clipped(data, tmp_path / "high", 1e4, **two))
    assert all(torch.equal(high.weights[name], weight) for name, weight in without.weights.items())
    assert [line["qk_clip"]["clipped_heads"] for line in high.metrics] == [0] * 2


def test_a_skipped_step_clips_nothing(data: DataConfig, tmp_path: Path) -> None:
    with SignalWatch() as signals:
        run = start_run(clipped(data, tmp_path), signals)
        before = gather_weights(run)
        stop = spoil_gradient(run.model.get_parameter("blocks.0.mixer.q_proj.weight"), lambda grad: grad * torch.nan)
        result = train_step(run)
        stop()
        for hook in run.hooks:
            hook.after_step(result)
        close_run(run)
    assert not result.applied
    assert result.found["qk_clip"]["clipped_heads"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in gather_weights(run).items())


TENSOR: dict[str, Any] = {"parallel__tensor": 2, "parallel__sequence_parallel": True}
CONTEXT: dict[str, Any] = {"parallel__context": 2, "parallel__zero_stage": 3}
QUICK: dict[str, dict[str, Any]] = {"tensor": TENSOR}
SLOW: dict[str, dict[str, Any]] = {
    "context": CONTEXT,
    "pipeline": {"parallel__pipeline": 2, "train__micro_batch_size": 1},
    "zero 0": {"parallel__zero_stage": 0},
    "zero 2": {"parallel__zero_stage": 2},
    "offload": {"parallel__offload_optimizer": True},
    "muon, tensor": MUON | TENSOR,
    "muon, context": MUON | CONTEXT,
    "muon, pipeline": MUON | {"parallel__pipeline": 2, "train__micro_batch_size": 1},
    "muon, zero 0": MUON | {"parallel__zero_stage": 0},
    "recompute": {"train__recompute": "full"},
}


def train_layouts(layouts: dict[str, dict[str, Any]], data: DataConfig, folder: str) -> dict[str, Trained]:
    found = {}
    for name, settings in layouts.items():
        with SignalWatch() as signals:
            run = start_run(clipped(data, Path(folder, name), **ADAMW | settings), signals)
            metrics = []
            for _ in range(2):
                result = train_step(run)
                for hook in run.hooks:
                    hook.after_step(result)
                metrics.append({"loss": result.loss, **result.found["qk_clip"]})
            found[name] = Trained(0, metrics, gather_weights(run))
            close_run(run)
    return found


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_every_layout_clips_as_one_rank_does(
    layouts: dict[str, dict[str, Any]], data: DataConfig, tmp_path: Path
) -> None:
    ranks = run_ranks(train_layouts, layouts, data, str(tmp_path / "two"), num_ranks=2)
    alone = {"adamw": {}} if layouts is QUICK else {"adamw": {}, "muon": MUON}
    (expected,) = run_ranks(train_layouts, alone, data, str(tmp_path / "one"), num_ranks=1)
    for name in layouts:
        own = expected["muon" if name.startswith("muon") else "adamw"]
        weights = {key: weight for rank in ranks for key, weight in rank[name].weights.items()}
        assert weights.keys() == own.weights.keys()
        for found, wanted in zip(ranks[0][name].metrics, own.metrics, strict=True):
            assert found["clipped_heads"] == wanted["clipped_heads"] > 0, name
            assert found["max_logit"] == pytest.approx(wanted["max_logit"], rel=1e-4), name
        for key, weight in own.weights.items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL | {"pattern": "M-"}}, r"has nothing to bound: no block of model.pattern"),
        (
            {"model": MODEL | {"attention": MODEL["attention"] | {"qk_norm": True}}},
            r"cannot bound the scores of \*: model.attention has qk_norm",
        ),
        ({"qk_clip": {"limit": 3.8}}, r"qk_clip.limit = 3.8: is not above 3.87, the log-sum-exp of 48 scores of 0"),
        (
            {"train": {"precision": "bf16"}, "optimizer": {"state_dtype": "bf16"}},
            r"bf16 master weights have no number between",
        ),
        ({"model": MODEL | {"lora_mixer": {"num_experts": 2}}}, r"adds updates to queries that it does not scale"),
    ],
)
def test_what_a_clip_cannot_bound_is_refused(
    data: DataConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = clipped(data, tmp_path)
    tree = config.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        tree[key] = value if key == "model" else tree[key] | value
    with pytest.raises(ConfigError, match=message):
        check_run(type(config).model_validate(tree))
