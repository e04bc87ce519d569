"""Guides of factored matrices vanish in the middle of a run: with a fresh start, bitwise identical results however often it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.packing import PackMeta
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.launcher_protocol import DONE, NEXT_LAYOUT
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import run_steps, train
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL, collect_weights, read_events, read_metrics, tiny_config

STEPS = 6  # the guides are gone after half of them
GUIDED = MODEL | {
    "pattern": "M-*E",
    "self_guided_training": {"skip": True},
    "feed_forward": {"hidden_size": 48, "linear_kind": "lowrank", "linear_rank": 8},
    "moe": MODEL["moe"]
    | {"shared_expert_linear_kind": "blockshuffle", "shared_expert_linear_blocks": 4, "shared_expert_hidden_size": 48},
}


def guided_config(data: DataConfig, run_dir: Path, **overrides: Any) -> RunConfig:
    parallel = overrides.pop("parallel", {})
    settings = {"train__steps": STEPS, "train__checkpoint_every_steps": 1} | overrides
    tree = tiny_config(data, run_dir, **settings).model_dump(mode="json", exclude_unset=True)
    return RunConfig.model_validate(tree | {"model": GUIDED, "parallel": parallel})


def start_until_done(config: RunConfig) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Start the run until it is done, as a launcher does: exit codes, and the last weights. Every rank must call this."""
    codes: list[int] = []
    weights: dict[str, torch.Tensor] = {}
    while not codes or codes[-1] == NEXT_LAYOUT:
        with SignalWatch() as signals:
            run = start_run(config, signals)
            codes.append(run_steps(run))
            weights = collect_weights(run)
            close_run(run)
    return codes, weights


def test_a_run_leaves_its_guides_behind_and_gives_the_same_bits_wherever_it_is_cut(
    data: DataConfig, tmp_path: Path
) -> None:
    codes, weights = start_until_done(guided_config(data, tmp_path / "whole"))
    assert codes == [NEXT_LAYOUT, DONE]
    assert [event["step"] for event in read_events(tmp_path / "whole", "guide_removed")] == [STEPS // 2]
    assert not any(name.endswith("guide_weight") for name in weights)
    for stop in (2, 4, STEPS):  # before the guides go and after; a start that stops where they go is the first run's
        settings = {"train__stop_after_steps": stop, "train__keep_last": 9}
        last = start_until_done(guided_config(data, tmp_path / "cut", **settings))
    whole, cut = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "cut")
    assert [line["step"] for line in cut] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in cut] == [line[key] for line in whole]
    assert all(torch.equal(last[1][name], value) for name, value in weights.items())
    # What a checkpoint holds as seen from outside: dense while the guide counts, then only the factors.
    for step, kind in ((2, "dense"), (3, "lowrank"), (4, "lowrank")):
        read = read_weights(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
        assert read.model.self_guided_training is None and read.model.feed_forward is not None
        assert read.model.feed_forward.linear_kind == kind
        read.build()
    # Another number of steps would move the end of the guides.
    with pytest.raises(ValueError, match=r"the checkpoint's guides end after step 3, this run's after step 4"):
        train(guided_config(data, tmp_path / "cut", train__steps=8))


def test_a_guided_checkpoint_read_as_dense_computes_what_the_run_does(data: DataConfig, tmp_path: Path) -> None:
    config = guided_config(data, tmp_path / "run", train__stop_after_steps=2)
    tokens_BT = torch.randint(448, (2, 40), generator=torch.Generator().manual_seed(0))
    meta = PackMeta.one_document_a_row(2, 40)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        assert run_steps(run) == DONE
        run.engine.wait_for_weights()
        run.model.eval()
        with torch.no_grad():
            expected = run.model(tokens_BT, meta).logits_BTV
        close_run(run)
    with torch.no_grad():
        found = read_weights(tmp_path / "run").build()(tokens_BT, meta).logits_BTV
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


LAYOUTS: list[dict[str, Any]] = [
    {"zero_stage": 0},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2},
]


def train_layouts(data: DataConfig, folder: str) -> list[list[int]]:
    codes = []
    for number, layout in enumerate(LAYOUTS):
        config = guided_config(data, Path(folder) / str(number), parallel=layout)
        codes.append(start_until_done(config)[0])
    return codes


@pytest.mark.slow
def test_guides_vanish_under_every_axis_as_on_one_rank(data: DataConfig, tmp_path: Path) -> None:
    start_until_done(guided_config(data, tmp_path / "one"))
    expected = read_metrics(tmp_path / "one")
    for codes in run_ranks(train_layouts, data, str(tmp_path), num_ranks=2):
        assert codes == [[NEXT_LAYOUT, DONE]] * len(LAYOUTS)
    for number, layout in enumerate(LAYOUTS):
        found = read_metrics(tmp_path / str(number))
        for key in ("loss", "grad_norm"):
            # float32 sums in another order.
            assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-4), layout
