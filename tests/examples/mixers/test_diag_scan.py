"""The selective scan in chunks against the step-by-step definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from amfm_mixers.diag_scan import triton_impl
from amfm_mixers.diag_scan.op import diag_scan, diag_step
from amfm_mixers.diag_scan.torch_impl import read_carried_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.runtime.first_use import check_now, digest_source
from amfm.launch.plan.flops import count_flops
from tests.examples.mixers.diags import NAMES, DiagCase, call, make, run
from tests.helpers.numbers import assert_all_near, assert_bitwise, assert_near

# float64: rounding of some 100 additions, and of a power of two taken for a power of e.
FLOAT64 = 1e-12
# float32: the same sums with 2^-24 a step.
FLOAT32 = 1e-5
# bfloat16 inputs are exact here and states float32: what is left is the rounding of outputs and gradients to 2^-9.
BFLOAT16 = 5e-3

MODULE = "amfm_mixers.diag_scan.case"
CASES = [
    DiagCase(T=1, C=1, N=1),
    DiagCase(T=1, initial=True),
    DiagCase(C=1, lengths=(1, 1, 61)),
    DiagCase(T=100, lengths=(1, 39, 1, 59), initial=True),
    DiagCase(T=129, chunk=64, lengths=(40, 70, 19)),
    DiagCase(T=129, initial=True),
    DiagCase(T=64, chunk=32, lengths=(32, 32), initial=True),
    DiagCase(B=3, T=33, C=1100, N=2, lengths=(9, 24), initial=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_equal_single_steps(case: DiagCase, poisoned_memory: None) -> None:
    arguments = make(case, torch.float64)
    expected = run(arguments, case, "reference")
    for name, value in run(arguments, case).items():
        assert_near(value, expected[name], FLOAT64, name)


def test_compiles_into_one_graph() -> None:
    case = CASES[3]
    arguments = make(case, torch.float64)
    expected = run(arguments, case, "reference")
    compiled = torch.compile(diag_scan, backend="aot_eager", fullgraph=True)
    for name, value in run(arguments, case, scan=compiled).items():
        assert_near(value, expected[name], FLOAT64, name)


@pytest.mark.parametrize("case", [CASES[3], CASES[4]], ids=str)
def test_bfloat16_stays_near_float64(case: DiagCase) -> None:
    arguments, exact = make(case, torch.bfloat16), make(case, torch.float64)
    with torch.no_grad():
        for name in (*NAMES, *(["initial"] if case.initial else [])):
            exact[name].copy_(arguments[name])
    expected = run(exact, case, "reference")
    for name, value in run(arguments, case).items():
        assert_near(value, expected[name], BFLOAT16, name)


def test_gradients_match_finite_differences() -> None:
    case = DiagCase(B=1, T=7, C=2, N=3, chunk=4, lengths=(2, 5), initial=True)
    arguments = make(case, torch.float64)
    names = (*NAMES, "initial")

    def scan(*tensors: Tensor) -> tuple[Tensor, ...]:
        return call(arguments | dict(zip(names, tensors)), case)

    assert torch.autograd.gradcheck(scan, tuple(arguments[name] for name in names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_document_never_feels_another(dtype: torch.dtype) -> None:
    case = DiagCase(B=1, T=100, lengths=(10, 30, 60))
    arguments = make(case, dtype)
    before = run(arguments, case)
    with torch.no_grad():
        for name in ("x", "dt", "B", "C"):
            arguments[name][:, 10:40] = torch.randn_like(arguments[name][:, 10:40]) * 3
    after = run(arguments, case)
    for name in ("y", "d_x", "d_dt", "d_B", "d_C"):
        assert_bitwise(after[name][:, :10], before[name][:, :10], f"{name} before")
        assert_bitwise(after[name][:, 40:], before[name][:, 40:], f"{name} after")
    assert_bitwise(after["final_state"], before["final_state"], "final_state")
    assert not torch.equal(after["y"][:, 10:40], before["y"][:, 10:40])


@pytest.mark.parametrize("lengths", [(), (20, 80)])
@pytest.mark.parametrize("cut", [1, 41])
def test_two_pieces_equal_the_whole(lengths: tuple[int, ...], cut: int) -> None:
    case = DiagCase(B=1, T=100, lengths=lengths, initial=True)
    arguments = make(case, torch.float64)
    whole = call(arguments, case)
    state, decay, pieces = arguments["initial"], 1.0, []
    for start, end in ((0, cut), (cut, 100)):
        part = {n: t[:, start:end] if n in ("x", "dt", "B", "C") else t for n, t in arguments.items()}
        documents = arguments["documents"]
        part["documents"] = None if documents is None else documents[:, start:end]
        y, final, total = call(part | {"initial": state}, case)
        without = call(part | {"initial": None}, case)[1]
        assert_near(total * state + without, final, FLOAT64, "composed state")
        state, decay = final, decay * total
        pieces.append(y)
    for name, value, expected in zip(("y", "state", "decay"), (torch.cat(pieces, 1), state, decay), whole):
        assert_near(value, expected, FLOAT64, name)


@pytest.mark.parametrize(
    "case",
    [
        DiagCase(T=1, initial=True),
        DiagCase(T=63, lengths=(30, 1, 32), initial=True),
        DiagCase(B=2, T=40, C=1100, N=3, initial=True),
    ],
    ids=str,
)
def test_reading_a_state_later_equals_a_scan_that_begins_with_it(case: DiagCase) -> None:
    arguments = make(case, torch.float64)
    _, dt, A_log, _, C, _, bias = (arguments[name] for name in NAMES)
    state = arguments["initial"]
    later = call(arguments | {"initial": None}, case)[0]
    later = later + read_carried_state(dt, A_log, C, bias, state, document_ids_BT=arguments["documents"])
    leaves = [*(arguments[name] for name in NAMES), state]
    weights = torch.randn(later.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = [[y, *torch.autograd.grad((y * weights).sum(), leaves)] for y in (later, call(arguments, case)[0])]
    assert_all_near(*results, FLOAT64, ["y", *NAMES, "initial"])


def test_reading_a_state_saves_nothing_of_the_size_of_its_decays() -> None:
    dt, A_log, C = torch.randn(1, 64, 32, requires_grad=True), torch.randn(32, 16), torch.randn(1, 64, 16)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        read_carried_state(dt, A_log, C, torch.zeros(32), torch.randn(1, 32, 16))
    assert max(saved) <= 64 * 32


def test_a_carried_state_of_another_shape_is_refused() -> None:
    dt, A_log, C = torch.zeros(2, 5, 4), torch.zeros(4, 6), torch.zeros(2, 5, 6)
    with pytest.raises(ValueError, match=r"state_BCN must have shape \[2, 4, 6\]; got \[2, 6, 4\]"):
        read_carried_state(dt, A_log, C, torch.zeros(4), torch.zeros(2, 6, 4))


def test_steps_continue_a_scan() -> None:
    case = DiagCase(T=9, initial=True)
    arguments = make(case, torch.float64)
    y, final, _ = call(arguments, case)
    x, dt, A_log, B, C, D, bias = (arguments[name] for name in NAMES)
    state = arguments["initial"]
    for t in range(9):
        out, state = diag_step(x[:, t], dt[:, t], A_log, B[:, t], C[:, t], D, bias, state)
        assert_near(out, y[:, t], FLOAT64, f"token {t}")
    assert_near(state, final, FLOAT64, "state")


def test_decays_that_vanish_leave_everything_finite_and_near() -> None:
    case = DiagCase(B=2, T=50, lengths=(20, 3, 27), initial=True)
    arguments, exact = make(case, torch.float32), make(case, torch.float64)
    with torch.no_grad():
        for these in (arguments, exact):
            these["dt"][:, :10] = -200.0  # softplus underflows to 0
            these["dt"][:, 10:45] = 50.0  # decays of about e^-50 a token
    expected = run(exact, case, "reference")
    for name, value in run(arguments, case).items():
        assert_near(value, expected[name], FLOAT32, name)


def test_chunk_size_changes_rounding_only() -> None:
    case = DiagCase(T=100, lengths=(30, 70))
    arguments = make(case, torch.float64)
    expected = call(arguments, case, "reference")
    for chunk in (1, 7, 64, 256):
        for value, of_steps in zip(call(arguments, DiagCase(T=100, chunk=chunk)), expected):
            assert_near(value, of_steps, FLOAT64, f"chunk {chunk}")


def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones() -> None:
    case = DiagCase(initial=True)
    real = make(case, torch.bfloat16)
    meta = {n: None if t is None else t.detach().to("meta").requires_grad_() for n, t in real.items()}
    for value, expected in zip(call(meta, case), call(real, case)):
        assert value.device.type == "meta"
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype)


def test_a_scan_saves_only_inputs_and_states_between_chunks() -> None:
    case = DiagCase(B=1, T=128, C=32, N=16, chunk=64)
    arguments = make(case, torch.float32)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(arguments, case)
    states, rows = 2 * 16 * 32 * 4, 128 * 32 * 4
    # x, raw dt with its bias, and dt; B and C and what a channel has are small next to them.
    assert sum(saved.values()) <= states + 4 * rows + 2 * 128 * 16 * 4 + 16 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt_BTC": torch.zeros(2, 5, 3)}, r"dt must have shape \[2, 5, 4\]; got \[2, 5, 3\]"),
        ({"C_BTN": torch.zeros(2, 5, 6).double()}, "C must be torch.float32"),
        ({"A_log_CN": torch.zeros(3, 6)}, r"A_log_CN must have shape \[4, any\]; got \[3, 6\]"),
        ({"x_BTC": torch.zeros(2, 5, 4, dtype=torch.int64)}, "x must be floating point"),
        ({"document_ids_BT": torch.zeros(2, 5)}, "int32 or int64"),
        ({"initial_state_BCN": torch.zeros(2, 6, 4)}, r"initial state must have shape \[2, 4, 6\]"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"backend": "cuda"}, "must be one of auto, triton, native, torch, reference; got 'cuda'"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    sizes = {"x_BTC": (2, 5, 4), "dt_BTC": (2, 5, 4), "A_log_CN": (4, 6), "B_BTN": (2, 5, 6), "C_BTN": (2, 5, 6)}
    arguments: dict[str, object] = {name: torch.zeros(size) for name, size in sizes.items()}
    arguments |= {"D_C": torch.zeros(4), "dt_bias_C": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        diag_scan(**(arguments | change))


class Counted(TorchDispatchMode):
    """FLOPs that a plan counts of each operation, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops[func._opname] = count_flops(func, args, kwargs or {}, out)
        return out


def test_a_plan_counts_the_kernels_of_this_package() -> None:
    with FakeTensorMode(), Counted() as counted:
        x, dt, B, C = (torch.randn(2, 40, size, requires_grad=True) for size in (6, 6, 4, 4))
        triton_impl._forward(x, dt, -torch.rand(6, 4), B, C, torch.rand(6), None, None, 16, True)[0].sum().backward()
    assert counted.flops["diag_scan_triton"] == 2 * 40 * 6 * 4 * 7
    assert counted.flops["diag_scan_triton_backward"] == 2 * 40 * 6 * 4 * 20


def test_what_is_known_of_kernels_depends_on_the_source_in_this_package() -> None:
    assert digest_source(MODULE) != digest_source()


@pytest.mark.slow
def test_the_first_use_checks_kernels_of_a_package_that_only_this_process_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a folder that a configuration names. Quick siblings: the interpreter's tests, and test_first_use.py."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "src"))
    assert check_now("diag_scan", "cpu", MODULE) == []
