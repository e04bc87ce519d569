"""Ways are timed in turns, and compared round by round."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.runtime.native import refuse_native
from benchmarks.generation.__main__ import build_ways
from benchmarks.native import compare, measure_operation
from tests.model.huggingface.cases import NEMOTRON_H

needs_compiler = pytest.mark.skipif(refuse_native(torch.device("cpu")) is not None, reason="no C compiler")


def test_ways_run_in_turns_and_the_first_round_only_warms_up() -> None:
    calls: list[str] = []
    found = compare({"one": lambda: calls.append("one"), "other": lambda: calls.append("other")}, 2)
    assert calls == ["one", "other"] * 3
    assert (
        found.keys() == {"one", "other", "ratio", "least", "most"} and found["least"] <= found["ratio"] <= found["most"]
    )


@needs_compiler
def test_an_operation_is_measured_by_both_ways() -> None:
    row = measure_operation(1, 64, 2, 16, True, 2)
    assert row["torch"] > 0 and row["native"] > 0 and row["what"].endswith("documents")


@needs_compiler
@pytest.mark.slow
def test_native_code_pytorch_and_transformers_choose_the_same_tokens() -> None:
    ways = build_ways(NEMOTRON_H, "nemotron_h", 64)
    native, torch_, theirs = (ways[name]([3, 5, 8, 13], 12)[0] for name in ("native", "torch", "transformers"))
    assert native == torch_ == theirs
