"""The selective scan of the first Mamba, with 16 state numbers per channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import (
    CardSizes,
    Compute,
    CountedProblem,
    Goal,
    HostSizes,
    Inputs,
    Minimum,
    Problem,
    bfloat16_inputs,
    find_package,
)
from amfm.kernels.cases.trial import Sized, Trial, documents
from amfm.kernels.diag_scan.op import diag_bytes, diag_flops, diag_scan

CHUNK_SIZE, STATE_SIZE = 64, 16
# Sums over all tokens: a head's gradients are judged by the size of what they sum.
SUMS = {"A_log": "dt", "dt_bias": "dt"}


def selective_problem(inputs: Inputs, tokens: int, channels: int, state: int, text: str) -> Problem:
    """One row; `text` describes its channels and states.

    Leaves: x and dt [1, T, C], A_log [C, N] with A = -1 .. -N as Mamba starts, B and C [1, T, N], D and the
    bias of dt [C].
    """
    T, C, N = tokens, channels, state
    x, dt = inputs.normal(1, T, C), inputs.normal(1, T, C)
    B, C_out = (inputs.normal(1, T, N, scale=0.3) for _ in range(2))
    A_log = torch.arange(1.0, N + 1, device=inputs.device).log().repeat(C, 1).requires_grad_()
    D, bias = inputs.uniform(C, low=1.0), inputs.normal(C, dtype=torch.float32)

    def peers() -> dict[str, Compute]:
        theirs = find_package("mamba_ssm.ops.selective_scan_interface")
        if theirs is None:
            return {}

        def mamba_ssm(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            x, dt, B, C = (each.transpose(1, 2) for each in (x, dt, B, C))
            out = theirs.selective_scan_fn(x, dt, -A_log.exp(), B, C, D, delta_bias=bias, delta_softplus=True)
            return out.transpose(1, 2)

        return {"mamba_ssm": mamba_ssm}

    forward, backward = (
        Minimum(diag_bytes(1, T, C, N, backward=way), diag_flops(1, T, C, N, backward=way)) for way in (False, True)
    )
    return Problem(
        f"1x{T}{text}",
        (x, dt, A_log, B, C_out, D, bias),
        lambda *leaves, backend: diag_scan(*leaves, backend=backend).y_BTC,
        forward,
        backward,
        peers,
    )


def counted_problems() -> Iterator[CountedProblem]:
    """One block of channels."""
    text = f"x64, {STATE_SIZE} state numbers, chunks of {CHUNK_SIZE}"
    problem = selective_problem(bfloat16_inputs(), 512, 64, STATE_SIZE, text)
    yield CountedProblem(
        "diag_scan",
        problem,
        Goal("of the formula", problem.forward.bytes, 1.2),
        Goal("of the formula", problem.backward.bytes, 1.4),
    )


def launches() -> Iterator[KernelLaunch]:
    """Both kernels, with documents.

    Steps after softplus, states and their gradients are float32.
    """
    from amfm.kernels.diag_scan import triton_impl as diag
    from amfm.kernels.diag_scan.triton_kernels import diag_backward_kernel, diag_forward_kernel

    types = dict.fromkeys(("x", "B", "C", "y", "d_y", "d_x"), "*bf16") | {"firsts": "*i32", "chunks": "i32"}
    floats = ("dt", "A", "D", "initial", "entering", "final", "d_final", "room")
    gradients = ("d_dt", "d_A", "d_B", "d_C", "d_D", "d_initial")
    types |= dict.fromkeys((*floats, *gradients), "*fp32")
    types |= dict.fromkeys(("T", "channels", "N", *(f"stride_{name}{dim}" for name in "xbc" for dim in "bt")), "i32:16")
    for way, kernel, config, special in (
        ("forward", diag_forward_kernel, diag.FORWARD[0], {"INITIAL": False, "initial": None, "SAVE": True}),
        ("backward", diag_backward_kernel, diag.BACKWARD[0], {"D_FINAL": False, "d_final": None}),
    ):
        constants = special | {"TILES": CHUNK_SIZE // config["Q"], "BLOCK_N": STATE_SIZE, "DOCUMENTS": True}
        yield kernel_launch(f"Mamba scan {way}, {STATE_SIZE} state numbers", kernel, types, constants, config)


def selective_trial(
    inputs: Inputs, tokens: int, channels: int, state: int, *, rows: int = 1, lengths: tuple[int, ...] = (),
    initial: bool = False, exact: str = "reference",
) -> Trial:  # fmt: skip
    """The first Mamba's scan."""
    C, N = channels, state
    leaves = {"x": inputs.normal(rows, tokens, C), "dt": inputs.normal(rows, tokens, C)}
    leaves["A_log"] = torch.arange(1.0, N + 1, device=inputs.device).log().repeat(C, 1).requires_grad_()
    leaves |= {name: inputs.normal(rows, tokens, N, scale=0.5) for name in ("B", "C")}
    leaves |= {"D": inputs.uniform(C, low=0.5), "dt_bias": inputs.uniform(C, low=-2.0, high=-1.0)}
    if initial:
        leaves["initial"] = inputs.normal(rows, C, N, dtype=torch.float32)
    ids = documents(inputs, tokens, *lengths, rows=rows) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        names = ("x", "dt", "A_log", "B", "C", "D", "dt_bias")
        out = diag_scan(
            *(given[name] for name in names), document_ids_BT=ids, initial_state_BCN=given.get("initial"),
            backend=backend,
        )  # fmt: skip
        return {"y": out.y_BTC, "final state": out.final_state_BCN}

    return Trial(leaves, run, SUMS, exact)


def trials() -> Iterator[Sized]:
    """The first Mamba with 16 state numbers per channel, and with few."""
    yield Sized(
        "16 states with documents", "first",
        partial(selective_trial, tokens=100, channels=24, state=16, lengths=(33, 1, 66), initial=True),
    )  # fmt: skip
    yield Sized("few states, two rows", "small", partial(selective_trial, tokens=63, channels=11, state=3, rows=2))
    yield Sized(
        "long row with documents", "long",
        partial(selective_trial, tokens=8205, channels=512, state=16, lengths=(4000, 1, 4204), exact="torch"),
    )  # fmt: skip


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    channels = sizes.heads * sizes.head_dim
    return selective_problem(inputs, sizes.tokens, channels, STATE_SIZE, f"x{channels}, {STATE_SIZE} state numbers")


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    channels, state = sizes.heads * sizes.head_dim, sizes.selective_state
    return selective_problem(inputs, sizes.tokens, channels, state, f", {channels} channels, state {state}")


CASE = OperationCase(
    "diag_scan", launches, counted_problems, trials, on_card={"diag_scan": _on_card}, on_host={"diag_scan": _on_host}
)
