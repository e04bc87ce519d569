"""RMS norm, with the residual stream's sum, and gated: one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.cases import (
    EPSILON,
    Compute,
    CountedProblem,
    GpuSizes,
    HostSizes,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    each_pass,
    find_package,
    formula_goals,
    slices,
)
from amfm.kernels.norm.layer_norm import layer_norm
from amfm.kernels.norm.op import gated_rms_norm, head_norm, norm_bytes, norm_flops, rms_norm


def norm_problem(
    inputs: Inputs, *shape: int, residual: bool = False, joins: bool = False, exact: str = "reference"
) -> Problem:
    """y = x / rms(x) * weight over the last dimension, or with `residual` the norm of x + residual, and that sum.

    Leaves: x, the residual and the weight [D]. `joins`: both results are one, so that the first output is both. PyTorch's own
    rms_norm is a peer that is always there.
    """
    leaves = {"x": inputs.normal(*shape)}
    if residual:
        leaves["residual"] = inputs.normal(*shape)
    leaves["weight"] = inputs.normal(shape[-1])

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x, weight = given["x"], given["weight"]
        if not residual:
            return {"y": rms_norm(x, weight, EPSILON, backend=backend)}
        y, h = rms_norm(x, weight, EPSILON, residual=given["residual"], backend=backend)
        return {"both": torch.stack((y, h))} if joins else {"y": y, "h": h}

    def peers() -> dict[str, Compute]:
        found: dict[str, Compute] = {"torch_rms_norm": lambda x, weight: F.rms_norm(x, shape[-1:], weight, EPSILON)}
        theirs = find_package("liger_kernel.transformers.rms_norm")
        if theirs is not None:
            module = theirs.LigerRMSNorm(shape[-1], eps=EPSILON).to(inputs.device, inputs.dtype)
            found["liger_kernel"] = lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x,))
        return found

    least = _minima(shape, residual=residual)
    return Problem(leaves, run, _text(shape), *least, dict if residual else peers, exact=exact)


def gated_problem(inputs: Inputs, *shape: int, groups: int = 1, exact: str = "reference") -> Problem:
    """The norm of y silu(z) in groups of a row, as Mamba2 ends.

    Leaves: y, z and the weight. The peer gates before it norms, as ours does.
    """

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        y, z, weight = given.values()
        return {"y": gated_rms_norm(y, z, weight, EPSILON, num_groups=groups, backend=backend)}

    def peers() -> dict[str, Compute]:
        theirs = find_package("mamba_ssm.ops.triton.layernorm_gated")
        if theirs is None:
            return {}
        settings = {"eps": EPSILON, "group_size": shape[-1] // groups, "norm_before_gate": False}
        return {"mamba_ssm": lambda y, z, weight: theirs.rmsnorm_fn(y, weight, None, z=z, **settings)}

    leaves = {"y": inputs.normal(*shape), "z": inputs.normal(*shape), "weight": inputs.normal(shape[-1])}
    return Problem(leaves, run, _text(shape), *_minima(shape, gated=True), peers, exact=exact)


def head_problem(
    inputs: Inputs, tokens: int, heads: int, size: int, *, act: Literal["silu", "sigmoid"] = "silu", gated: bool = True,
    exact: str = "reference",
) -> Problem:  # fmt: skip
    """The norm of each head and its gate, as linear mixers end; leaves: o [1, T, H, V], the gate, a slice, and the weight [V]."""
    leaves = {"o": inputs.normal(1, tokens, heads, size)}
    if gated:
        leaves["gate"] = slices(inputs.normal(1, tokens, heads * size + 8), 8, heads * size)[1]
    leaves["weight"] = inputs.normal(size)

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        return {"y": head_norm(given["o"], given.get("gate"), given["weight"], EPSILON, act=act, backend=backend)}

    least = _minima((tokens, heads, size), gated=gated)
    return Problem(leaves, run, f"{tokens} tokens, {heads} heads of {size}", *least, exact=exact)


def layer_norm_problem(inputs: Inputs, *shape: int, exact: str = "reference") -> Problem:
    """LayerNorm with a residual, as the stream has it. Leaves: x, residual, weight and bias."""

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x, residual, weight, bias = given.values()
        y, h = layer_norm(x, weight, bias, EPSILON, residual=residual, backend=backend)
        return {"y": y, "h": h}

    leaves = {name: inputs.normal(*shape) for name in ("x", "residual")}
    leaves |= {name: inputs.normal(shape[-1]) for name in ("weight", "bias")}
    return Problem(leaves, run, _text(shape), *_minima(shape, residual=True), dict, exact=exact)


def _text(shape: tuple[int, ...]) -> str:
    """A shape as it is shown in tables."""
    return "x".join(map(str, shape))


def _minima(shape: tuple[int, ...], *, gated: bool = False, residual: bool = False) -> tuple[Minimum, Minimum]:
    """Least bytes and operations of forward and backward, for 2-byte values."""
    values = torch.Size(shape).numel()
    return each_pass(
        lambda back: Minimum(
            norm_bytes(values, gated=gated, residual=residual, backward=back),
            norm_flops(values, gated=gated, backward=back),
        )
    )


def counted_problems() -> Iterator[CountedProblem]:
    """All three, at the same size."""
    for op, build in (
        ("rms_norm", norm_problem),
        ("rms_norm_residual", partial(norm_problem, residual=True, joins=True)),
        ("gated_rms_norm", gated_problem),
    ):
        problem = build(bfloat16_inputs(), 512, 512)
        yield CountedProblem(op, problem, *formula_goals(problem, 1.1))
    problem = head_problem(bfloat16_inputs(), 128, 4, 128)
    yield CountedProblem("head_norm", problem, *formula_goals(problem, 1.1))


def trials() -> Iterator[Sized]:
    """With the residual stream's sum, and gated in groups."""

    def normed(rows: int, width: int, **settings: Any) -> Callable[[Inputs], Problem]:
        return lambda inputs: norm_problem(inputs, rows, width, **settings)

    def gated(rows: int, width: int, **settings: Any) -> Callable[[Inputs], Problem]:
        return lambda inputs: gated_problem(inputs, rows, width, **settings)

    yield Sized("with residual, 1024 wide", "first", normed(37, 1024, residual=True))
    yield Sized("LayerNorm", "first", lambda inputs: layer_norm_problem(inputs, 37, 1000))
    yield Sized("gated, groups of 512", "first", gated(37, 1024, groups=2))
    yield Sized("heads with a gate", "first", partial(head_problem, tokens=9, heads=4, size=128))
    odd = partial(head_problem, tokens=37, heads=3, size=20)
    yield Sized("uneven heads with a sigmoid", "small", partial(odd, act="sigmoid"))
    yield Sized("uneven heads without a gate", "small", partial(odd, gated=False))
    yield Sized("uneven width", "small", normed(63, 129))
    yield Sized("gated, 8 uneven groups", "small", gated(9, 24, groups=8))
    yield Sized("with residual, 4096 wide", "long", normed(8205, 4096, residual=True, exact="torch"))
    yield Sized("32 heads with a gate", "long", partial(head_problem, tokens=8205, heads=32, size=128, exact="torch"))
    yield Sized("gated, 8192 wide", "long", gated(8205, 8192, exact="torch"))
    yield Sized("gated, 3072 wide in 3 groups", "long", gated(8205, 3072, groups=3, exact="torch"))


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return norm_problem(inputs, sizes.tokens, sizes.model)


def _gated_on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    return gated_problem(inputs, sizes.tokens, sizes.heads * sizes.head_dim)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    return norm_problem(inputs, sizes.rows, sizes.tokens, sizes.norm_width)


def _gated_on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    return gated_problem(inputs, sizes.rows, sizes.tokens, sizes.heads * sizes.head_dim)


CASE = OperationCase(
    "norm",
    counted_problems,
    trials,
    on_gpu={"rms_norm": _on_gpu, "gated_rms_norm": _gated_on_gpu},
    on_host={"gated_rms_norm": _gated_on_host, "rms_norm": _on_host},
)
