"""Weights that nothing steps: saved without moments, resumed bitwise, and never taken for trained ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from amfm_foreign_states.universal import export_universal

from amfm.pretrain.checkpoint.inspect import diff_checkpoints, inspect_checkpoint, read_full_state
from amfm.pretrain.checkpoint.manifest_file import read_manifest
from amfm.pretrain.parallel import initialize_parallel, set_determinism
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import digest_state, load, make_engine, run_steps, save

FROZEN = ("experts", "down.weight", "norm.bias")


def resume_frozen(folder: str, stage: int, precision: str) -> tuple[str, str, list[str]]:
    """Digests of an uninterrupted engine and of one that was saved, rebuilt from another seed, and continued."""
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    whole = make_engine(parallel, stage=stage, precision=precision, frozen=FROZEN)
    run_steps(whole, 0, 2)
    before = {name: whole.module.get_parameter(name).detach().clone() for name in FROZEN}
    path = save(Path(folder) / f"{stage}-{precision}", 2, whole)
    again = make_engine(parallel, stage=stage, precision=precision, seed=1, frozen=FROZEN)
    load(path.parent, again)
    moved = [name for name in FROZEN if not torch.equal(again.module.get_parameter(name), before[name])]
    digests = []
    for engine in (whole, again):
        set_determinism(3)
        run_steps(engine, 2, 4)
        digests.append(digest_state(engine))
    return digests[0], digests[1], moved


@pytest.mark.parametrize(("stage", "precision"), [(0, "float32"), (1, "bf16"), (2, "float32")])
def test_a_run_with_frozen_weights_resumes_bit_for_bit(tmp_path: Path, stage: int, precision: str) -> None:
    whole, again, moved = resume_frozen(str(tmp_path), stage, precision)
    assert whole == again
    assert not moved


@pytest.mark.slow  # one rank does the same
@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "float32"), (2, "bf16")])
def test_two_ranks_with_frozen_weights_resume_bit_for_bit(tmp_path: Path, stage: int, precision: str) -> None:
    for whole, again, moved in run_ranks(resume_frozen, str(tmp_path), stage, precision):
        assert whole == again
        assert not moved


def test_a_checkpoint_holds_frozen_weights_without_moments(tmp_path: Path) -> None:
    engine = make_engine(
        initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1), precision="bf16", frozen=FROZEN
    )
    run_steps(engine, 0, 2)
    path = save(tmp_path, 2, engine)
    manifest = read_manifest(path)
    assert {name for name, entry in manifest["parameters"].items() if entry["group"] == "frozen"} == set(FROZEN)
    state = read_full_state(path)
    for name in FROZEN:
        assert torch.equal(state[name], engine.module.get_parameter(name).float())
    found = inspect_checkpoint(path)
    assert found["ok"] and found["parameters"]["by_group"]["frozen"] == 3 * 31 * 31 + 3 * 31 + 31
    assert diff_checkpoints(path, path)["same"]
    with pytest.raises(ValueError, match=r"3 others, .* first, are frozen and have no moments"):
        export_universal(path, tmp_path / "universal")


def test_frozen_and_trained_weights_are_not_taken_for_each_other(tmp_path: Path) -> None:
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    some = make_engine(parallel, frozen=FROZEN)
    run_steps(some, 0, 1)
    save(tmp_path / "some", 1, some)
    with pytest.raises(RuntimeError, match="experts is in group decay, in the checkpoint in frozen"):
        load(tmp_path / "some", make_engine(parallel))
    everything = make_engine(parallel)
    run_steps(everything, 0, 1)
    save(tmp_path / "all", 1, everything)
    with pytest.raises(RuntimeError, match="experts is frozen, in the checkpoint in group decay"):
        load(tmp_path / "all", make_engine(parallel, frozen=FROZEN))
