"""bf16 master weights and moments: rounding loses nothing on average, depends only on places, and a run continues
bitwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.config.schema import OptimizerConfig, ParallelConfig
from amfm.pretrain.engine.adamw import Bf16AdamW, draw, round_by_chance
from amfm.pretrain.engine.engine import ZeroEngine, build_engine
from amfm.pretrain.engine.parts import Part, Span
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import load, save
from tests.pretrain.tiny_run import MODEL

RATE = 1e-2
SETTINGS = {"train__precision": "bf16", "optimizer__state_dtype": "bf16"}
CPU = torch.device("cpu")


def test_numbers_between_two_of_bf16_go_up_as_often_as_they_are_near() -> None:
    number = 1 << 16
    chance = draw(0, number, 0, 1, CPU)
    for value, low, high, share in ((1 + 2**-9, 1.0, 1 + 2**-7, 0.25), (-3 - 3 * 2**-8, -3.0, -3 - 2**-6, 0.75)):
        rounded = torch.empty(number, dtype=torch.bfloat16)
        round_by_chance(rounded, torch.full((number,), value), chance[:, 1])
        assert set(rounded.unique().tolist()) == {low, high}
        # Five standard deviations of a mean of 65,536 throws.
        assert (rounded == high).double().mean().item() == pytest.approx(share, abs=0.009)
    exact = torch.randn(number).bfloat16()
    for place in (1, 2, 3):
        kept = torch.empty_like(exact)
        round_by_chance(kept, exact.float(), chance[:, place])
        assert torch.equal(kept, exact)


def make_part(master: Tensor, *spans: Span) -> Part:
    return Part(master, 0, spans, (0,), replicated=False, data_group=None, spans_of=lambda rank: spans)


def step_with(master: Tensor, gradients: list[Tensor], *spans: Span, rate: float = RATE) -> Bf16AdamW:
    optimizer = Bf16AdamW(
        [{"params": [master], "label": "decay", "weight_decay": 0.1}], lr=rate, betas=(0.9, 0.95), eps=1e-8
    )
    optimizer.attach([make_part(master, *spans)])
    for gradient in gradients:
        master.grad = gradient.bfloat16()
        optimizer.step()
    return optimizer


def test_steps_too_small_for_bf16_add_up() -> None:
    master = torch.ones(4096, dtype=torch.bfloat16)
    # 50 steps of 1e-4, and decay of 1e-5: none would move a 1 that is rounded to the nearest 256th.
    step_with(master, [torch.ones(4096)] * 50, Span("w", 0, 4096, 0), rate=1e-4)
    assert master.float().mean().item() == pytest.approx(1 - 50 * 1.1e-4, abs=5e-4)


def test_steps_are_those_of_float32_within_the_rounding() -> None:
    torch.manual_seed(0)
    first, gradients = torch.randn(300).bfloat16(), [torch.randn(300).bfloat16() for _ in range(4)]
    master, exact = first.clone(), torch.nn.Parameter(first.float())
    step_with(master, gradients, Span("w", 0, 300, 0))
    adamw = torch.optim.AdamW([exact], lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in gradients:
        exact.grad = gradient.float()
        adamw.step()
    # Four roundings of the weight by up to a 128th, and of moments, which move a step by as much.
    assert torch.allclose(master.float(), exact.detach(), rtol=4 * 2**-7, atol=4 * RATE * 2**-5)


def test_rounding_depends_on_name_and_place_and_not_on_the_cut() -> None:
    torch.manual_seed(0)
    whole, gradient = torch.randn(40).bfloat16(), torch.randn(40).bfloat16()
    begin, end = whole[:25].clone(), torch.cat([torch.zeros(3), whole[25:], torch.zeros(2)]).bfloat16()
    step_with(begin, [gradient[:25]] * 2, Span("v", 0, 10, 0), Span("w", 0, 15, 10))
    padded = torch.cat([torch.zeros(3), gradient[25:], torch.zeros(2)])
    step_with(end, [padded] * 2, Span("w", 15, 15, 3))
    step_with(whole, [gradient] * 2, Span("v", 0, 10, 0), Span("w", 0, 30, 10))
    assert torch.equal(torch.cat([begin, end[3:-2]]), whole)
    assert not end[:3].any() and not end[-2:].any()


def make_engine(zero_stage: int, seed: int, **axes: int) -> ZeroEngine:
    section = ParallelConfig(zero_stage=zero_stage, **axes)
    parallel = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    model = HybridModel(ModelConfig.model_validate(MODEL), parallel.groups, seed=seed)
    optimizer = OptimizerConfig(learning_rate=RATE, state_dtype="bf16")
    return build_engine(model, optimizer=optimizer, precision="bf16", zero_stage=zero_stage, parallel=parallel)


def run_steps(engine: ZeroEngine, first: int, last: int) -> list[tuple[float, float]]:
    """Step on tokens that depend only on the step; (loss, gradient norm) a step."""
    results, meta = [], PackMeta.one_document_a_row(2, 16)
    for step in range(first, last):
        tokens_BT = torch.randint(0, 448, (2, 16), generator=torch.Generator().manual_seed(step))
        with engine.accumulate(1):
            output = engine.forward(tokens_BT, meta, tokens_BT)
            engine.backward(output.loss.total / 64)
        results.append((float(output.loss.nll_sum), engine.step(RATE).grad_norm))
    return results


# The ZeRO stage, the layout, and the stage that loads it.
Cases = list[tuple[int, dict[str, int], int]]
QUICK: Cases = [(1, {"tensor": 2}, 3)]
MORE: Cases = [(2, {}, 1), (3, {}, 2)]


def save_and_go_on(folder: str, cases: Cases) -> tuple[list[Any], set[torch.dtype], str]:
    """Under each ZeRO stage steps straight and through a checkpoint; and that checkpoint saved again by another layout."""
    root, results, dtypes = Path(folder), [], set()
    for stage, axes, other in cases:
        here = root / str(stage)
        engine = make_engine(stage, 0, **axes)
        straight = run_steps(engine, 0, 2)
        save(here / "first", 2, engine, **SETTINGS)
        straight += run_steps(engine, 2, 3)
        save(here / "straight", 3, engine, **SETTINGS)
        for master, state in engine.adamw.state.items():
            dtypes |= {master.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype}
        again = make_engine(stage, 5, **axes)
        assert load(here / "first", again, **SETTINGS) is not None
        results.append((straight[2:], run_steps(again, 2, 3)))
        save(here / "resumed", 3, again, **SETTINGS)
        moved = make_engine(other, 5)
        assert load(here / "first", moved, **SETTINGS) is not None
        save(here / "moved", 2, moved, **SETTINGS)
    with pytest.raises(ValueError) as refused:
        load(here / "first", moved, train__precision="bf16")
    return results, dtypes, str(refused.value)


@pytest.mark.parametrize("cases", [QUICK, pytest.param(MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_a_run_goes_on_bit_for_bit_and_moves_between_layouts(tmp_path: Path, cases: Cases) -> None:
    results, dtypes, refused = run_ranks(save_and_go_on, str(tmp_path), cases, num_ranks=2)[0]
    assert dtypes == {torch.bfloat16}
    for (stage, _, _), (straight, resumed) in zip(cases, results, strict=True):
        assert straight == resumed
        here = tmp_path / str(stage)
        assert diff_checkpoints(here / "straight/step-00000003", here / "resumed/step-00000003")["same"]
        assert diff_checkpoints(here / "first/step-00000002", here / "moved/step-00000002")["same"]
    assert "optimizer.state_dtype: the checkpoint has 'bf16', this run has 'float32'" in refused
    assert "takes only the weights, with run.initial_weights" in refused
