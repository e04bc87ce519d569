"""State as ranges of parameters: shares of what ranks hold alike, state before a first step, settings as JSON, master weights put back."""

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
from amfm.pretrain.engine.parts import list_parts
from amfm.pretrain.parallel import Parallel, initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import make_engine, run_steps


@pytest.fixture
def parallel() -> Parallel:
    return initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)


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


def wanted(name: str, numel: int) -> Tensor:
    """Numbers for a parameter, the same on every rank."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel + len(name)))


def put_back(stage: int, precision: str) -> list[str]:
    """New master weights after a step, and the parameters that the model then computes with as they were."""
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    engine = make_engine(parallel, stage=stage, precision=precision)
    run_steps(engine, 0, 1)
    sizes = {name: getattr(weight, "ds_numel", weight.numel()) for name, weight in engine.module.named_parameters()}
    parts = list_parts(engine.deepspeed)
    for part in parts:
        flat = create_state(engine.deepspeed, part, 5)["weight"]
        for span in part.spans:
            own = wanted(span.name, sizes[span.name])[span.start : span.start + span.numel]
            flat[span.flat_start : span.flat_start + span.numel] = own
    assert engine.buckets is None or engine.buckets.gathers, "gathers of the step's weights are under way"
    refresh_working_weights(engine)
    assert engine.buckets is None or not engine.buckets.gathers, "they would land on top of the restored weights"
    assert {fragment.optimizer_step for fragment in collect_fragments(engine.deepspeed, parts)} == {5}
    wrong = []
    for name, weight in engine.module.named_parameters():
        right = wanted(name, sizes[name]).to(weight.dtype)
        if weight.numel() and not torch.equal(weight.detach().flatten(), right):
            wrong.append(name)
        if stage == 3:
            range_R = weight.ds_tensor.detach()
            own = right[parallel.rank * len(range_R) :][: len(range_R)]
            if not torch.equal(range_R[: len(own)], own):
                wrong.append(f"range of {name}")
    if stage == 3:
        assert len({weight.numel() > 0 for weight in engine.module.parameters()}) == 2, "only small ones stay gathered"
    return wrong


@pytest.mark.parametrize(
    ("num_ranks", "stage", "precision"), [(1, 0, "float32"), (1, 0, "bf16"), (2, 1, "bf16"), (2, 3, "bf16")]
)
def test_masters_that_are_put_back_are_what_the_model_computes_with(num_ranks: int, stage: int, precision: str) -> None:
    if num_ranks == 1:
        assert put_back(stage, precision) == []
    else:
        assert run_ranks(put_back, stage, precision) == [[], []]
