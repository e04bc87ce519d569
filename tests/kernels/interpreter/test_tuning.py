"""The tuner: what it refuses to time, what it keeps, and when kernels read it. Kernels run in the interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.runtime import tuning
from amfm.kernels.runtime.tuning import Environment, Table, config_for, tune

HOPPER = Environment("NVIDIA H100 80GB HBM3", "3.9.0", "13.4.59")
CPU = torch.device("cpu")
FIXED, FASTER, SKIPS_LAST, DRIFTS = {"BLOCK": 16}, {"BLOCK": 32}, {"BLOCK": 16, "CUT": 1}, {"BLOCK": 16, "DRIFT": 1}
MILLISECONDS = {"16": 2.0, "32": 1.0}


@triton.jit
def _double_kernel(x, y, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, 2.0 * tl.load(x + place, mask=place < size, other=0.0), mask=place < size)


class Doubling:
    """An operation with one kernel, two of whose candidates are broken: one skips its last block, one is not repeatable."""

    def __init__(self, *candidates: dict[str, int]) -> None:
        self.candidates, self.timed, self.calls = candidates, [], 0
        self.x = torch.arange(1.0, 51.0)

    def run(self) -> list[Tensor]:
        config = config_for("double", (self.x.dtype,), self.candidates, CPU)
        self.config, self.calls = config, self.calls + 1
        y = torch.full_like(self.x, float("nan")) if "CUT" in config else torch.empty_like(self.x)
        blocks = triton.cdiv(50, config["BLOCK"]) - config.get("CUT", 0)
        _double_kernel[(blocks,)](self.x, y, 50, BLOCK=config["BLOCK"])
        return [y + config.get("DRIFT", 0) * self.calls * 1e-6]

    def measure(self, work: object) -> float:
        self.timed.append(dict(self.config))
        return MILLISECONDS[str(self.config["BLOCK"])]


def tune_doubling(op: Doubling, table: Table) -> list[str]:
    reports: list[str] = []
    tune(op.run, [2 * op.x], op.measure, table, tolerance=1e-3, report=reports.append)
    return reports


def test_the_fastest_right_candidate_is_kept_and_wrong_ones_are_never_timed() -> None:
    op, table = Doubling(FIXED, SKIPS_LAST, DRIFTS, FASTER), Table(HOPPER)
    reports = tune_doubling(op, table)
    assert op.timed == [FIXED, FASTER]
    assert table.configs == {"double torch.float32": FASTER}
    assert "is wrong by nan" in reports[0]
    assert "returns other values the second time" in reports[1] or "is wrong by" in reports[1]


def test_a_kernel_that_is_wrong_as_it_stands_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"double torch.float32: the kernel's own configuration .* is wrong by nan"):
        tune_doubling(Doubling(SKIPS_LAST, FASTER), Table(HOPPER))


def test_entries_of_a_table_are_not_timed_again() -> None:
    op, table = Doubling(FIXED, FASTER), Table(HOPPER, {"double torch.float32": dict(FIXED)})
    tune_doubling(op, table)
    assert op.timed == []
    assert table.configs["double torch.float32"] == FIXED


def test_outside_a_session_the_interpreter_takes_the_first_candidate() -> None:
    assert config_for("double", (1,), (FIXED, FASTER), CPU) == FIXED
    assert config_for("double", (1,), (FIXED, FASTER), torch.device("cuda")) == FIXED


def test_a_table_comes_back_from_disk_for_its_card_and_compilers_alone(tmp_path: Path) -> None:
    own, shipped = tmp_path / "own", tmp_path / "shipped"
    Table(HOPPER, {"a 1": {"BLOCK": 1}, "b 2": {"BLOCK": 2}}).save(shipped)
    path = Table(HOPPER, {"b 2": {"BLOCK": 4}}).save(own)
    assert Table.load(HOPPER, (own, shipped)).configs == {"a 1": {"BLOCK": 1}, "b 2": {"BLOCK": 4}}
    for other in (
        Environment("NVIDIA H200", HOPPER.triton, HOPPER.ptxas),
        Environment(HOPPER.card, "3.9.1", HOPPER.ptxas),
        Environment(HOPPER.card, HOPPER.triton, "13.5.1"),
    ):
        assert other.file_name() != HOPPER.file_name()
        assert Table.load(other, (own, shipped)).configs == {}
    assert sorted(file.name for file in own.iterdir()) == [path.name]
    path.write_text(json.dumps({"environment": {"card": "another"}, "configs": {}}))
    with pytest.raises(ValueError, match=r"holds the table of .*another.*delete it"):
        Table.load(HOPPER, (own,))


def test_a_choice_between_kernels_is_timed_behind_the_tiles_that_were_chosen() -> None:
    op, table, seen = Doubling(FIXED, FASTER), Table(HOPPER), []

    def run() -> list[Tensor]:
        chosen = config_for("doubling_backend", (1,), ({"TORCH": 0}, {"TORCH": 1}), CPU)["TORCH"]
        result = [2 * op.x] if chosen else op.run()
        seen.append((chosen, dict(op.config)))
        return result

    tune(run, [2 * op.x], lambda _: 3.0 - seen[-1][0], table, tolerance=1e-3, report=lambda _: None)
    assert table.configs == {"double torch.float32": FIXED, "doubling_backend 1": {"TORCH": 1}}
    timed = [chosen for chosen, _ in seen]
    assert timed.index(1) > len([config for chosen, config in seen if config == FASTER])


def test_answers_are_kept_until_a_table_is_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_ADOPTED", [])
    asked = []

    @tuning.kept_until_retuned
    def find(block: int) -> dict[str, int]:
        asked.append(block)
        return {"BLOCK": block}

    assert [find(16), find(16), find(32)] == [FIXED, FIXED, FASTER] and asked == [16, 32]
    with tuning._session():
        find(16)
    tuning.adopt_table(Table(HOPPER))
    find(16)
    assert asked == [16, 32, 16, 16]


@pytest.mark.slow
def test_real_kernels_can_be_tuned() -> None:
    """The scan with its gradients: each of its kernels has candidates, and all of them hold.

    Quick: the tests above, and `test_all_candidates_of_every_kernel_hold_together` in test_delta_scan.py.
    """
    from amfm.kernels.decay_scan.op import decay_scan

    torch.manual_seed(0)
    leaves = [torch.randn(1, 9, 1, 16, requires_grad=True) for _ in range(3)]
    g = (-torch.rand(1, 9, 1)).requires_grad_()

    def run(backend: str = "triton") -> list[Tensor]:
        out = decay_scan(*leaves, g, chunk_size=16, backend=backend).o_BTHV
        return [out.detach(), *torch.autograd.grad(out.sum(), (*leaves, g))]

    table, timed = Table(HOPPER), []

    def measure(work: object) -> float:
        timed.append(work)
        return float(len(timed))

    tune(run, run("torch"), measure, table, tolerance=1e-4, report=lambda _: None)
    assert {entry.split()[0] for entry in table.configs} == {"scan_walk", "scan_walk_back", "scan_gradients"}
    assert len(timed) > len(table.configs)
    assert not tuning._SESSIONS
