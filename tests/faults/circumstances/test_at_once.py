"""Two programs at the same data: two trains of one directory, a preparation of a store that a run reads, an export while checkpoints go."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.store import TokenStore
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.failures import describe, exit_code
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, RUN_FAILED
from tests.faults import inject
from tests.faults.attempt import Attempt
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny_store import run_in_process
from tests.pretrain.tiny_run import read_metrics, tiny_data

STEPS = {"train__steps": 40, "train__checkpoint_every_steps": 10}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def hold_until(path: Path, reached: Path) -> Callable[[Any], None]:
    """Say that a step was reached, and wait for an answer."""

    def hold(run: Any) -> None:
        reached.touch()
        wait_for(path)

    return hold


def train_twice(place: str) -> dict[str, Any]:
    """A second train of a directory in which a first one is in its third step."""
    folder = Path(place)
    data = tiny_data(folder / "data")
    hold = hold_until(folder / "ended", folder / "reached")
    first = Attempt(data, folder / "run", STEPS, 1, prepare=lambda rank: inject.after_step(3, hold))
    first.start()
    wait_for(folder / "reached")
    second = Attempt(data, folder / "run", STEPS, 1)
    second.start()
    codes = [second.finish()]
    said = (folder / "run" / "error-0.txt").read_text()
    (folder / "ended").touch()
    codes.append(first.finish())
    straight = Attempt(data, folder / "straight", STEPS, 1)
    straight.start()
    codes.append(straight.finish())
    losses = [[line["loss"] for line in read_metrics(folder / name)] for name in ("run", "straight")]
    return {"codes": codes, "said": said, "same": losses[0] == losses[1]}


@pytest.mark.slow
def test_of_two_trains_in_one_directory_the_first_goes_on_as_if_alone(tmp_path: Path) -> None:
    (result,) = run_ranks(train_twice, str(tmp_path), num_ranks=1)
    assert result["codes"] == [[RUN_FAILED], [DONE], [DONE]]
    assert "another process trains in" in result["said"] and result["same"]


def prepare_again(data: DataConfig, seed: int | None) -> None:
    """Prepare the store again, as it was or with another order of documents."""
    settings = data.prepare if seed is None else data.prepare.model_copy(update={"seed": seed})
    prepare(data.model_copy(update={"prepare": settings}), runner=run_in_process)


def prepare_under_a_run(place: str) -> dict[str, Any]:
    """Runs under which their store is prepared again: with the same settings, and with others."""
    folder = Path(place)
    results: dict[str, Any] = {}
    for name, seed in (("same", None), ("other", 7)):
        data = tiny_data(folder / name)
        before = TokenStore.open(data.store).identity()

        def again(run: Any, data: DataConfig = data, seed: int | None = seed) -> None:
            prepare_again(data, seed)

        run = Attempt(
            data, folder / f"run-{name}", STEPS, 1, prepare=lambda rank, again=again: inject.after_step(3, again)
        )  # type: ignore[misc]
        run.start()
        codes = run.finish()
        errors = [path.read_text() for path in (folder / f"run-{name}").glob("error-*.txt")]
        losses = [line["loss"] for line in read_metrics(folder / f"run-{name}")]
        results[name] = (codes, errors, losses, TokenStore.open(data.store).identity() == before)
    return results


@pytest.mark.slow
def test_a_preparation_under_a_run_changes_nothing_or_ends_it_by_name(tmp_path: Path) -> None:
    (results,) = run_ranks(prepare_under_a_run, str(tmp_path), num_ranks=1)
    codes, errors, losses, is_same = results["same"]
    assert (codes, errors, is_same, len(losses)) == ([DONE], [], True, STEPS["train__steps"])
    codes, errors, other, is_same = results["other"]
    assert not is_same
    # What was read before is what it was; a part of the new store is none of this run's.
    assert other == losses[: len(other)]
    assert codes == [DONE] if len(other) == len(losses) else codes == [RUN_FAILED] and errors, (codes, errors)


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().float().numpy().tobytes()).hexdigest()


def export_while_pruning(place: str) -> dict[str, Any]:
    """Exports again and again of a run that saves at each step and keeps two checkpoints."""
    folder = Path(place)
    data = tiny_data(folder / "data")
    settings = {"train__steps": 30, "train__checkpoint_every_steps": 1, "train__keep_last": 2}
    known: list[str] = []

    def note(run: Any) -> None:
        weights = dict(run.model.named_parameters())["embedding.weight"].detach()
        with (folder / "known").open("a") as file:
            file.write(digest(weights) + "\n")

    def prepare_rank(rank: int) -> None:
        for step in range(1, 31):
            inject.after_step(step, note)

    run = Attempt(data, folder / "run", settings, 1, prepare=prepare_rank)
    run.start()
    wait_for(folder / "run" / "checkpoints" / "latest")
    ends: list[tuple[int, str]] = []
    exported: list[str] = []
    while not run.has_ended() or not ends:
        out = folder / "out"
        try:
            export_checkpoint(folder / "run", out, verify=False)
            ends.append((DONE, ""))
            with safe_open(out / "model.safetensors", "pt") as file:
                name = next(name for name in file.keys() if "embedding" in name)  # noqa: SIM118 - not a dict
                exported.append(digest(file.get_tensor(name)))
        except (ValueError, RuntimeError, OSError) as error:
            ends.append((exit_code(error), describe(error)))
            assert not out.exists()
        shutil.rmtree(out, ignore_errors=True)
    codes = run.finish()
    known = (folder / "known").read_text().split()
    return {"codes": codes, "ends": ends, "foreign": [name for name in exported if name not in known]}


@pytest.mark.slow
def test_an_export_while_checkpoints_are_pruned_is_whole_or_refused(tmp_path: Path) -> None:
    (result,) = run_ranks(export_while_pruning, str(tmp_path), num_ranks=1)
    assert result["codes"] == [DONE] and result["foreign"] == []
    assert {code for code, _ in result["ends"]} <= {DONE, BAD_INPUT, RUN_FAILED} and (DONE, "") in result["ends"]
    assert all(str(tmp_path) in said for code, said in result["ends"] if code), result["ends"]
