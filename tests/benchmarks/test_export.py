"""Exports and imports take the same memory for a model and for one three times as deep."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.model.config.schema import ModelConfig
from amfm.model.on_demand import on_demand
from benchmarks.command import run
from benchmarks.export import bench_export, deepen, export, random_weights
from tests.pretrain.tiny_run import MODEL


def test_a_deeper_model_has_the_blocks_several_times() -> None:
    config = ModelConfig.model_validate(MODEL)
    deeper = deepen(config, 3)
    assert list(deeper.letters) == list(config.letters) * 3
    once, thrice = random_weights(config), random_weights(deeper)
    ends = sum(on_demand(once.state)[name].numel() for name in once.state if not name.startswith("blocks."))
    assert thrice.num_parameters() - ends == 3 * (once.num_parameters() - ends)


def test_numbers_that_are_none_are_refused(base: Path, capsys) -> None:
    assert run(export, [str(base), "--times", "1,x"]) == 2
    assert "--times 1,x must be integers" in capsys.readouterr().err


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_model() -> None:
    config = ModelConfig.model_validate(MODEL | {"hidden_size": 1024, "vocab_size": 8192, "pattern": "*-" * 4})
    config = config.model_copy(update={"feed_forward": config.feed_forward.model_copy(update={"hidden_size": 4096})})
    once, more = bench_export(config, (1, 4), None, report=lambda _: None)["rows"]
    assert more["bytes"] - once["bytes"] > 2**28
    for verb in ("export", "import"):
        # Names and descriptions grow with the blocks, tensors do not.
        assert more[verb]["peak_bytes"] < once[verb]["peak_bytes"] + 2**27
        assert more[verb]["peak_bytes"] < 2 * 2**30
