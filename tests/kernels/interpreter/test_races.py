"""Races that are found, each in a kernel that has it on a GPU and gives the right numbers in the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from amfm.kernels.swiglu.op import swiglu
from benchmarks.kernels.counting import count_launches
from tests.kernels.watch.races import Race, find_races


@pytest.fixture(autouse=True)
def no_races() -> None:
    """Races are wanted here, in place of the fixture of this name that holds other tests to none."""


@triton.jit
def _shift_left_kernel(x, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + at + 1))


@triton.jit
def _sum_kernel(x, total):
    tl.store(total, tl.load(total) + tl.load(x + tl.program_id(0)))


@triton.jit
def _mark_kernel(flag):
    tl.store(flag, 1.0)


@triton.jit
def _reverse_kernel(x, room, y, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(room + lane, tl.load(x + lane))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + lane, tl.load(room + SIZE - 1 - lane))


@triton.jit
def _scatter_kernel(y, value, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(y + lane // 2, tl.load(value + lane))


@triton.jit
def _count_kernel(counts, total, READ: tl.constexpr):
    tl.atomic_add(counts, 1)
    if READ:
        tl.store(total + tl.program_id(0), tl.load(counts))


def _faults(races: list[Race]) -> set[tuple[str, str]]:
    return {(race.argument, race.fault) for race in races}


def test_a_program_that_reads_what_the_next_one_writes_is_found() -> None:
    x = torch.arange(33.0)
    with find_races() as races:
        _shift_left_kernel[(2,)](x, SIZE=16)
    assert x[:32].tolist() == list(range(1, 33)), "the interpreter on its own shows nothing"
    between = ("x", "writes what another program reads")
    assert _faults(races) == {between, ("x", "writes what it reads itself, with no barrier between")}
    (race,) = [race for race in races if race.fault == between[1]]
    assert (race.kernel, race.line.split(":")[0]) == ("_shift_left_kernel", "test_races.py")


def test_programs_that_add_to_one_number_are_found() -> None:
    total = torch.zeros(1)
    with find_races() as races:
        _sum_kernel[(3,)](torch.ones(3), total)
    assert total.item() == 3
    assert {("total", "reads what another program writes"), ("total", "writes what another program writes")} <= _faults(
        races
    )


def test_programs_that_write_one_number_are_found() -> None:
    with find_races() as races:
        _mark_kernel[(2,)](torch.zeros(1))
    assert _faults(races) == {("flag", "writes what another program writes")}


@pytest.mark.parametrize("barrier", [True, False])
def test_a_program_that_reads_back_its_own_stores_needs_a_barrier(barrier: bool) -> None:
    x, room, y = torch.arange(8.0), torch.empty(8), torch.empty(8)
    with find_races() as races:
        _reverse_kernel[(1,)](x, room, y, BARRIER=barrier, SIZE=8)
    assert torch.equal(y, x.flip(0))
    assert _faults(races) == (set() if barrier else {("room", "reads what it writes itself, with no barrier between")})


@pytest.mark.parametrize("values", [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 3.0]])
def test_lanes_of_one_store_may_share_a_place_only_with_one_value(values: list[float]) -> None:
    with find_races() as races:
        _scatter_kernel[(1,)](torch.zeros(2), torch.tensor(values), SIZE=4)
    racing = values[2] != values[3]
    assert _faults(races) == ({("y", "writes two values to one place in one store")} if racing else set())


@pytest.mark.parametrize("read", [True, False])
def test_atomic_updates_meet_each_other_but_no_reads(read: bool) -> None:
    counts = torch.zeros(1, dtype=torch.int32)
    with find_races() as races:
        _count_kernel[(2,)](counts, torch.zeros(2, dtype=torch.int32), READ=read)
    assert counts.item() == 2
    assert {fault for _, fault in _faults(races)} == (
        {
            "reads what it updates itself, with no barrier between",
            "reads what another program updates",
            "updates what another program reads",
        }
        if read
        else set()
    )


def test_launches_after_each_other_are_ordered() -> None:
    x = torch.arange(33.0)
    with find_races() as races:
        for _ in range(2):
            _mark_kernel[(1,)](x)
    assert races == []


def test_memory_behind_no_argument_is_refused() -> None:
    with (
        pytest.raises(triton.runtime.errors.InterpreterError, match="touches memory of none of its arguments"),
        find_races(),
    ):
        _mark_kernel[(1,)](torch.zeros(4)[:0])


def test_watching_and_counting_nest_and_end_with_their_blocks() -> None:
    x = torch.randn(2, 8)
    with find_races() as outer:
        with count_launches() as launches, find_races() as inner:
            swiglu(x, backend="triton")
        _mark_kernel[(2,)](x)
    _mark_kernel[(2,)](x)
    assert len(launches) == 1 and inner == [] and len(outer) == 1
