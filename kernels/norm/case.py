"""RMS norm, with the residual stream's sum, and gated: one kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch, OperationCase, kernel_launch
from amfm.kernels.cases.problem import (
    EPSILON,
    CardSizes,
    Compute,
    CountedProblem,
    HostSizes,
    Inputs,
    Minimum,
    Problem,
    bfloat16_inputs,
    find_package,
    formula_goals,
)
from amfm.kernels.cases.trial import Sized, Trial
from amfm.kernels.norm.op import gated_rms_norm, norm_bytes, norm_flops, rms_norm


def norm_problem(inputs: Inputs, *shape: int) -> Problem:
    """y = x / rms(x) * weight over the last dimension.

    Leaves: x and the weight [D]. PyTorch's own rms_norm is a peer that is always there.
    """

    def run(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        return rms_norm(x, weight, EPSILON, backend=backend)

    def peers() -> dict[str, Compute]:
        found: dict[str, Compute] = {"torch_rms_norm": lambda x, weight: F.rms_norm(x, shape[-1:], weight, EPSILON)}
        theirs = find_package("liger_kernel.transformers.rms_norm")
        if theirs is not None:
            module = theirs.LigerRMSNorm(shape[-1], eps=EPSILON).to(inputs.device, inputs.dtype)
            found["liger_kernel"] = lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x,))
        return found

    leaves = (inputs.normal(*shape), inputs.normal(shape[-1]))
    return Problem(_text(shape), leaves, run, *_minima(shape), peers)


def residual_problem(inputs: Inputs, *shape: int) -> Problem:
    """The norm of x + residual, and that sum, stacked.

    Stacked, because the result of a problem is one tensor and both parts must take a gradient.
    """

    def run(x: Tensor, residual: Tensor, weight: Tensor, backend: str) -> Tensor:
        return torch.stack(rms_norm(x, weight, EPSILON, residual=residual, backend=backend))

    leaves = (inputs.normal(*shape), inputs.normal(*shape), inputs.normal(shape[-1]))
    return Problem(_text(shape), leaves, run, *_minima(shape, residual=True))


def gated_problem(inputs: Inputs, *shape: int) -> Problem:
    """The norm of y silu(z), one group a row, as Mamba2 ends.

    Leaves: y, z and the weight. The peer gates before it norms, as ours does.
    """

    def run(y: Tensor, z: Tensor, weight: Tensor, backend: str) -> Tensor:
        return gated_rms_norm(y, z, weight, EPSILON, backend=backend)

    def peers() -> dict[str, Compute]:
        theirs = find_package("mamba_ssm.ops.triton.layernorm_gated")
        if theirs is None:
            return {}
        settings = {"eps": EPSILON, "group_size": shape[-1], "norm_before_gate": False}
        return {"mamba_ssm": lambda y, z, weight: theirs.rmsnorm_fn(y, weight, None, z=z, **settings)}

    leaves = (inputs.normal(*shape), inputs.normal(*shape), inputs.normal(shape[-1]))
    return Problem(_text(shape), leaves, run, *_minima(shape, gated=True), peers)


def _text(shape: tuple[int, ...]) -> str:
    """A shape as it is shown in tables."""
    return "x".join(map(str, shape))


def _minima(shape: tuple[int, ...], *, gated: bool = False, residual: bool = False) -> tuple[Minimum, Minimum]:
    """Least bytes and operations of forward and backward, for 2-byte values."""
    values = torch.Size(shape).numel()
    forward, backward = (
        Minimum(
            norm_bytes(values, gated=gated, residual=residual, backward=way),
            norm_flops(values, gated=gated, backward=way),
        )
        for way in (False, True)
    )
    return forward, backward


def counted_problems() -> Iterator[CountedProblem]:
    """All three, at the same size."""
    for op, build in (
        ("rms_norm", norm_problem),
        ("rms_norm_residual", residual_problem),
        ("gated_rms_norm", gated_problem),
    ):
        problem = build(bfloat16_inputs(), 512, 512)
        yield CountedProblem(op, problem, *formula_goals(problem, 1.1))


def launches() -> Iterator[KernelLaunch]:
    """Both kernels at the widths of presets."""
    from amfm.kernels.norm.triton_impl import TILE_VALUES, WARP_VALUES
    from amfm.kernels.norm.triton_kernels import norm_backward_kernel, norm_forward_kernel

    names = ("x", "other", "z", "out", "h", "d_out", "d_h", "d_x", "d_z", "weight")
    types = dict.fromkeys(names, "*bf16") | {"reciprocal": "*fp32", "partial": "*fp32", "epsilon": "fp32"}
    types |= dict.fromkeys(("rows", "size", "stride_x"), "i32:16")
    types |= dict.fromkeys(("stride_other", "stride_z", "stride_dz"), "i32")
    # Strides of a projection are multiples of its heads at worst: 8 and not 16 with 24 of them (`amfm.kernels.common.strides`).
    for label, block, gated, unit in (
        ("norm with residual, up to 4096 wide", 4096, False, 16),
        ("norm with residual, up to 8192 wide", 8192, False, 16),
        ("gated norm, groups of 512 (Nemotron)", 512, True, 8),
        ("gated norm, up to 8192 wide (Granite)", 8192, True, 16),
    ):
        rows = max(1, TILE_VALUES // block)
        config = {"BLOCK_S": block, "BLOCK_R": rows, "num_warps": max(1, min(16, block * rows // WARP_VALUES))}
        forward = {"GATED": gated, "RESIDUAL": not gated, "UNIT": unit} | ({"h": None} if gated else {})
        backward: dict[str, Any] = {"GATED": gated, "D_H": not gated, "OUT": False, "out": None, "UNIT": unit}
        backward |= {"d_h": None} if gated else {"z": None, "d_z": None}
        yield kernel_launch(f"{label}, forward", norm_forward_kernel, types, forward, config)
        yield kernel_launch(f"{label}, backward", norm_backward_kernel, types, backward, config)
        if gated:
            again = {name: value for name, value in backward.items() if name != "out"} | {"OUT": True}
            yield kernel_launch(f"{label}, backward with output", norm_backward_kernel, types, again, config)


def trials() -> Iterator[Sized]:
    """With the residual stream's sum, and gated in groups."""

    def trial(
        inputs: Inputs, rows: int, width: int, *, groups: int = 0, residual: bool = False, exact: str = "reference"
    ) -> Trial:
        leaves = {"x": inputs.normal(rows, width)}
        if groups or residual:
            leaves["z" if groups else "residual"] = inputs.normal(rows, width)
        leaves["weight"] = inputs.normal(width)

        def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
            x, weight = given["x"], given["weight"]
            if groups:
                return {"y": gated_rms_norm(x, given["z"], weight, EPSILON, num_groups=groups, backend=backend)}
            if residual:
                y, h = rms_norm(x, weight, EPSILON, residual=given["residual"], backend=backend)
                return {"y": y, "h": h}
            return {"y": rms_norm(x, weight, EPSILON, backend=backend)}

        return Trial(leaves, run, exact=exact)

    yield Sized("with residual, 1024 wide", "first", partial(trial, rows=37, width=1024, residual=True))
    yield Sized("gated, groups of 512", "first", partial(trial, rows=37, width=1024, groups=2))
    yield Sized("uneven width", "small", partial(trial, rows=63, width=129))
    yield Sized("gated, 8 uneven groups", "small", partial(trial, rows=9, width=24, groups=8))
    yield Sized("with residual, 4096 wide", "long", partial(trial, rows=8205, width=4096, residual=True, exact="torch"))
    yield Sized("gated, 8192 wide", "long", partial(trial, rows=8205, width=8192, groups=1, exact="torch"))
    yield Sized("gated, 3072 wide in 3 groups", "long", partial(trial, rows=8205, width=3072, groups=3, exact="torch"))


def _on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return norm_problem(inputs, sizes.tokens, sizes.model)


def _gated_on_card(inputs: Inputs, sizes: CardSizes) -> Problem:
    return gated_problem(inputs, sizes.tokens, sizes.heads * sizes.head_dim)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    return norm_problem(inputs, sizes.rows, sizes.tokens, sizes.norm_width)


def _gated_on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    return gated_problem(inputs, sizes.rows, sizes.tokens, sizes.heads * sizes.head_dim)


CASE = OperationCase(
    "norm",
    launches,
    counted_problems,
    trials,
    on_card={"rms_norm": _on_card, "gated_rms_norm": _gated_on_card},
    on_host={"gated_rms_norm": _gated_on_host, "rms_norm": _on_host},
)
