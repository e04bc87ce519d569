"""Resuming is exact, in the layout that saved and in any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.checkpoint.toys import digest_state, load, make_engine, run_steps, save

Cases = tuple[tuple[str, int], ...]
# Every stage and each precision; and the other halves of the product.
QUICK: Cases = (("float32", 0), ("bf16", 1), ("float32", 2), ("bf16", 3))
MORE: Cases = (("bf16", 0), ("float32", 1), ("bf16", 2), ("float32", 3))


def resume_in_every_stage(folder: str, cases: Cases) -> dict[str, Any]:
    """On each rank: train, save, continue; then load into a fresh engine and continue again."""
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    results = {}
    for precision, stage in cases:
        place = Path(folder, f"{precision}-{stage}")
        engine = make_engine(parallel, stage=stage, precision=precision)
        run_steps(engine, 0, 3)
        save(place, 3, engine, train__precision=precision)
        at_save = digest_state(engine)
        straight = (run_steps(engine, 3, 6), digest_state(engine))
        fresh = make_engine(parallel, stage=stage, precision=precision, seed=1)
        loaded = load(place, fresh, train__precision=precision)
        at_load = digest_state(fresh)
        resumed = (run_steps(fresh, 3, 6), digest_state(fresh))
        assert loaded is not None
        facts = (loaded.step, loaded.state, loaded.skipped, loaded.warnings)
        results[f"{precision}-{stage}"] = (at_save == at_load, straight == resumed, facts)
    return results


def load_into_other_stages(folder: str, target: str, cases: Cases) -> list[str]:
    """Load each checkpoint into an engine of another stage, and save it from there under `target`."""
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    warnings: list[str] = []
    for precision, stage in cases:
        other = (stage + (2 if precision == "bf16" else 1)) % 4
        engine = make_engine(parallel, stage=other, precision=precision, seed=2)
        loaded = load(Path(folder, f"{precision}-{stage}"), engine, train__precision=precision)
        assert loaded is not None
        warnings += loaded.warnings
        save(Path(target, f"{precision}-{stage}-{other}"), 3, engine, train__precision=precision)
    return warnings


def check_exact(results: list[dict[str, Any]]) -> None:
    """Every rank: the state at the save, and losses, norms and state of the steps after it, bitwise."""
    for result in results:
        assert len(result) == 4
        for case, (state_same, course_same, facts) in result.items():
            assert state_same, case
            assert course_same, case
            assert facts == (3, {"cursor": 3, "seen": {"tokens": 30}}, (), ()), case


def check_moved(folder: Path, target: Path) -> None:
    """What another layout loaded and saved again holds the same numbers."""
    places = sorted(target.iterdir())
    assert len(places) == 4
    for place in places:
        source = folder / place.name.rsplit("-", 1)[0]
        difference = diff_checkpoints(source / "step-00000003", place / "step-00000003")
        assert difference["same"], (place.name, difference)


@pytest.fixture(scope="module", params=[QUICK, pytest.param(MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def cases(request: pytest.FixtureRequest) -> Cases:
    return request.param


@pytest.fixture(scope="module")
def by_two(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Checkpoints of every stage and precision by two ranks, and what happened on resuming them there."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(resume_in_every_stage, str(folder), cases, num_ranks=2)


@pytest.fixture(scope="module")
def by_one(
    cases: Cases, tmp_path_factory: pytest.TempPathFactory, by_two: tuple[Path, Any]
) -> tuple[Path, Any, Path, Any]:
    """The same by one rank, and the two ranks' checkpoints saved again by it from another stage."""
    folder, moved = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("moved")
    results = run_ranks(resume_and_load_others, str(folder), str(by_two[0]), str(moved), cases, num_ranks=1)[0]
    return folder, [results[0]], moved, results[1]


def resume_and_load_others(folder: str, others: str, target: str, cases: Cases) -> tuple[Any, list[str]]:
    """Both jobs in one process: starting one costs more than the work."""
    return resume_in_every_stage(folder, cases), load_into_other_stages(others, target, cases)


def test_resume_reproduces_state_losses_and_norms_bitwise_on_two_ranks(by_two: tuple[Path, Any]) -> None:
    assert len(by_two[1]) == 2
    check_exact(by_two[1])


def test_resume_reproduces_state_losses_and_norms_bitwise_on_one_rank(by_one: tuple[Path, Any, Path, Any]) -> None:
    check_exact(by_one[1])


def test_one_rank_loads_what_two_saved_in_another_stage(
    by_two: tuple[Path, Any], by_one: tuple[Path, Any, Path, Any]
) -> None:
    check_moved(by_two[0], by_one[2])
    assert by_one[3] == []


@pytest.mark.slow  # three seconds alone, ten on a busy machine; the opposite way is always tested
def test_two_ranks_load_what_one_saved_in_another_stage(
    cases: Cases, by_one: tuple[Path, Any, Path, Any], tmp_path: Path
) -> None:
    warnings = run_ranks(load_into_other_stages, str(by_one[0]), str(tmp_path), cases, num_ranks=2)
    check_moved(by_one[0], tmp_path)
    assert warnings[0] == warnings[1]
    assert warnings[0] and all("rank 1 did not exist among the 1 that saved" in text for text in warnings[0])
