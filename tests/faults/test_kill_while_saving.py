"""kill -9 inside the save protocol: before every operation on the disk, at random moments, and on one rank of two."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import RankFailedError, run_ranks
from tests.pretrain.checkpoint.toys import digest_state, load, make_engine, run_steps, save

# Everything that the protocol asks of the disk, and through which a kill may fall.
OPERATIONS = ("mkdir", "fsync", "rename", "unlink", "rmdir")


def kill_at_operation(number: int) -> None:
    """From now on this process dies before its operation of that number, counted from 0."""
    count = -1

    def guarded(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **keywords)

        return call

    for name in OPERATIONS:
        setattr(os, name, guarded(getattr(os, name)))


def in_child(work: Callable[[], None]) -> int:
    """Do the work in a forked process, and return the child's process id at once."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid


def was_killed(pid: int) -> bool:
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def make_three(folder: Path) -> tuple[ZeroEngine, dict[int, str]]:
    """An engine at step 3, checkpoints of steps 1 and 2 in the folder, and the digest of the state at each step."""
    engine = make_engine(initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1))
    digests = {}
    for step in (1, 2, 3):
        run_steps(engine, step - 1, step)
        if step < 3:
            save(folder, step, engine)
        else:
            save(folder.with_name("third"), step, engine)
        digests[step] = digest_state(engine)
    return engine, digests


def kill_before_operations(place: str, saved_before: bool, every: int) -> list[int]:
    """Save step 3 again and again, killed `every` operations later each time; returns the step found after each kill."""
    pristine = Path(place, "pristine")
    engine, digests = make_three(pristine)
    if saved_before:
        load(pristine.with_name("third"), engine)
        save(pristine, 3, engine)
    folder = Path(place, "checkpoints")
    found = []
    for number in range(0, 1000, every):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder)

        def work(number: int = number) -> None:
            load(folder.with_name("third"), engine)  # in the child: Python's generator reseeds itself on a fork
            kill_at_operation(number)
            save(folder, 3, engine, keep_last=2)

        if not was_killed(in_child(work)):
            return found
        loaded = load(folder, engine)
        assert loaded is not None
        assert loaded.skipped == (), (number, loaded.skipped)
        assert digest_state(engine) == digests[loaded.step], number
        found.append(loaded.step)
        load(folder.with_name("third"), engine)
        save(folder, 3, engine, keep_last=2)
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002", "step-00000003"], number
    raise AssertionError("the save never ended")


@pytest.mark.parametrize("saved_before", [False, True])
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_before_any_operation_a_whole_checkpoint_is_found(
    tmp_path: Path, saved_before: bool, every: int
) -> None:
    found = run_ranks(kill_before_operations, str(tmp_path), saved_before, every, num_ranks=1)[0]
    assert len(found) >= 10 / every
    if saved_before:
        assert set(found) == {3}
    else:
        # The rename is the commit: before it the old one is found, after it the new one, and never again the old one.
        assert found == sorted(found) and set(found) == {2, 3}


def kill_at_random_moments(place: str, num_kills: int) -> int:
    """Kill a process that saves without pause; returns how far it came."""
    engine, _ = make_three(Path(place, "checkpoints"))
    folder = Path(place, "checkpoints")
    moments = random.Random(0)
    step = 2

    def work() -> None:
        for next_step in range(step + 1, 10_000):
            save(folder, next_step, engine, keep_last=2)

    for number in range(num_kills):
        pid = in_child(work)
        # Most die within their first save; some live longer, so that there is progress on a busy machine too.
        time.sleep(moments.uniform(0, 0.05 if number % 8 else 1.0))
        os.kill(pid, signal.SIGKILL)
        assert was_killed(pid)
        loaded = load(folder, engine)
        assert loaded is not None
        assert loaded.skipped == () and loaded.step >= step and loaded.state["cursor"] == loaded.step
        step = loaded.step
    return step


@pytest.mark.parametrize("num_kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_newest_whole_checkpoint_is_found(tmp_path: Path, num_kills: int) -> None:
    assert run_ranks(kill_at_random_moments, str(tmp_path), num_kills, num_ranks=1)[0] > 2


def die_on_one_rank(folder: str, number: int) -> None:
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    engine = make_engine(parallel)
    save(Path(folder), 1, engine)
    if parallel.rank == 1:
        kill_at_operation(number)
    save(Path(folder), 2, engine)


def load_on_all_ranks(folder: str) -> tuple[int, tuple[str, ...]]:
    engine = make_engine(initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1))
    loaded = load(Path(folder), engine)
    assert loaded is not None
    return loaded.step, loaded.skipped


def test_the_death_of_one_rank_while_saving_ends_the_others_and_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError) as error:
        run_ranks(die_on_one_rank, str(tmp_path), 0, num_ranks=2)
    # By the death, or by the connection that it cut; not because a wait for the dead one ran out.
    assert "imed out" not in str(error.value)
    assert not (tmp_path / "step-00000002").exists()
    assert run_ranks(load_on_all_ranks, str(tmp_path), num_ranks=2) == [(1, ())] * 2
