"""State as ranges of parameters: shares of what ranks hold alike, state before a first step, settings as JSON, masters put back."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from amfm.pretrain.checkpoint.fragments import (
    Fragment,
    collect_fragments,
    collect_group_settings,
    create_state,
    refresh_working_weights,
    restore_group_settings,
)
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.engine.parts import list_parts
from amfm.pretrain.parallel import Parallel, initialize_parallel
from tests.pretrain.checkpoint.toys import make_engine, run_steps


@pytest.fixture
def parallel() -> Parallel:
    return initialize_parallel(timeout_seconds=60, num_threads=1)


def test_ranks_that_hold_the_same_write_every_number_once() -> None:
    whole = {"weight": torch.arange(7.0), "exp_avg": torch.arange(7.0) + 10}
    alike = Fragment("a", 20, 7, whole, 3, "decay", (3, 5, 8), True)
    cuts = [alike.share(rank) for rank in alike.data_ranks]
    assert [(cut.start, cut.numel) for cut in cuts if cut is not None] == [(20, 2), (22, 2), (24, 3)]
    for kind, flat in whole.items():
        assert torch.equal(torch.cat([cut.tensors[kind] for cut in cuts if cut is not None]), flat)
    single = Fragment("b", 4, 1, {"weight": torch.ones(1)}, 3, "decay", (3, 5), True)
    assert single.share(3) is None and single.share(5) == single
    own = Fragment("c", 4, 2, {"weight": torch.ones(2)}, 3, "decay", (3, 5), False)
    assert own.share(5) is own


def test_what_was_never_stepped_has_moments_of_zero_at_step_zero(parallel: Parallel) -> None:
    engine = make_engine(parallel)
    for steps in (0, 1):
        run_steps(engine, 0, steps)
        for fragment in collect_fragments(engine.deepspeed, list_parts(engine.deepspeed)):
            assert fragment.optimizer_step == steps and set(fragment.tensors) == {"weight", "exp_avg", "exp_avg_sq"}
            assert bool(fragment.tensors["exp_avg"].any()) == bool(steps)


def test_settings_of_groups_pass_through_json_and_back(parallel: Parallel) -> None:
    engine = make_engine(parallel)
    run_steps(engine, 0, 1)
    engine.adamw.param_groups[0].update(lr=torch.tensor(0.25), betas=(torch.tensor(0.5), 0.75))
    settings = json.loads(json.dumps(collect_group_settings(engine.deepspeed)))
    assert set(settings) == {"decay", "no_decay"}
    first = engine.adamw.param_groups[0]
    assert settings[first["label"]]["lr"] == 0.25 and settings[first["label"]]["betas"] == [0.5, 0.75]
    first.update(lr=1.0, betas=(0.0, 0.0))
    restore_group_settings(engine.deepspeed, settings)
    assert first["lr"] == 0.25 and first["betas"] == (0.5, 0.75)
    for group in engine.adamw.param_groups:
        group.update(label="decay", lr=0.5, betas=(0.5, 0.75), weight_decay=0.0)
    assert set(collect_group_settings(engine.deepspeed)) == {"decay"}
    engine.adamw.param_groups[-1]["lr"] = 0.125
    with pytest.raises(AssertionError, match="two groups of label decay have different settings"):
        collect_group_settings(engine.deepspeed)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "float32"), (0, "bf16"), (1, "bf16"), (2, "float32"), (3, "bf16")]
)
def test_masters_that_are_put_back_are_what_the_model_computes_with(
    parallel: Parallel, stage: int, precision: str
) -> None:
    engine = make_engine(parallel, stage=stage, precision=precision)
    run_steps(engine, 0, 1)
    parts = list_parts(engine.deepspeed)
    expected: dict[str, Tensor] = {}
    for part in parts:
        flats = create_state(engine.deepspeed, part, 5)
        for span in part.spans:
            wanted = torch.randn(span.numel, generator=torch.Generator().manual_seed(span.numel))
            flats["weight"][span.flat_start : span.flat_start + span.numel] = wanted
            expected[span.name] = wanted
    refresh_working_weights(engine.deepspeed)
    assert {fragment.optimizer_step for fragment in collect_fragments(engine.deepspeed, parts)} == {5}
    for name, weights in working_weights(engine).items():
        for held in weights:
            assert torch.equal(held.flatten(), expected[name].to(held.dtype)), name


def working_weights(engine: ZeroEngine) -> dict[str, list[Tensor]]:
    """What a rank that is alone has for a parameter: under ZeRO 3 its range, and the whole where that stays gathered."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        whole = [] if parameter.numel() == 0 else [parameter.detach()]
        if engine.zero_stage == 3:
            whole.append(parameter.ds_tensor.detach()[: parameter.ds_numel])
        found[name] = whole
    if engine.zero_stage == 3:
        counts = {len(whole) for whole in found.values()}
        assert counts == {1, 2}, "small ones stay gathered, large ones do not"
    return found
