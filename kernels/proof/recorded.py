"""Launches of an operation's kernels as production makes them, recorded from the operation itself.

How: trials of a case, and what it calls besides, run on the meta device, forward and backward. Bodies of custom operations run as Python, so that every
launch happens with its real types, constants and tiles; it is noted and does nothing. Launches are one form where the kernel,
its constexprs, types of pointers, warps and stages are the same; whether an integer is 1, or 16 divides it, is taken from the
first. So no list of launches is kept by hand next to the code that makes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from amfm.kernels.cases import Kind, OperationCase
from amfm.kernels.common.custom_op import find_body
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import replace_methods

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
}
# Products of codes with their scales are Blackwell's, products of codes Hopper's.
SCALED_PRODUCT, CODES = "tl.dot_scaled(", "fp8e4nv"


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel as production launches it: arguments of `amfm.kernels.proof.ahead_of_time.compile_ahead`, and a name.

    `first_architecture`: the oldest that has what it needs, 90 for products of 8-bit numbers.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    multiplies: bool = False
    first_architecture: int = 80


class _Bodies(TorchDispatchMode):
    """Runs the bodies of operations made of Triton kernels, which fake functions would stand for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        body = find_body(func)
        if body is None:
            return func(*args, **(kwargs or {}))
        with self:
            return body(*args, **(kwargs or {}))


def record(case: OperationCase, kinds: Collection[Kind] = ("first", "long")) -> dict[str, KernelLaunch]:
    """Every form that a case's trials, and the calls besides, launch in bfloat16, forward and backward, by name.

    Raises RuntimeError in the interpreter, whose tiles are others.
    """
    if INTERPRETED:
        raise RuntimeError("launches cannot be recorded under TRITON_INTERPRET=1; start Python without it")
    found: dict[str, KernelLaunch] = {}

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return partial(note_launch, found, kernel)

    with replace_methods(JITFunction, {"__getitem__": launch}), _Bodies():
        for sized in case.trials_of(kinds):
            trial = sized.make(torch.device("meta"), torch.bfloat16)
            outputs = [each for each in trial.run(trial.leaves, "triton").values() if each.requires_grad]
            torch.autograd.grad(outputs, [*trial.leaves.values()], [torch.empty_like(each) for each in outputs])
        case.also()
    return found


def note_launch(found: dict[str, KernelLaunch], kernel: Any, *arguments: Any, **named: Any) -> None:
    """Add a launch with these arguments to those found, if none is of the same form."""
    made = describe_launch(kernel, dict(zip(kernel.arg_names, arguments)) | named)
    found.setdefault(made.name, made)


def describe_launch(kernel: Any, given: dict[str, Any]) -> KernelLaunch:
    """What the compiler is given for a launch with these arguments by name: types, constants and options."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    options: dict[str, int] = {name: given[name] for name in ("num_warps", "num_stages") if name in given}
    for parameter in kernel.params:
        value, name, specializes = given[parameter.name], parameter.name, not parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and specializes
        if parameter.is_constexpr or value is None or is_one:
            constants[name] = value
        else:
            signature[name] = _type_of(value, specializes=specializes)
    has_codes = any(CODES in kind for kind in signature.values())
    has_scales = SCALED_PRODUCT in inspect.getsource(kernel.fn)
    return KernelLaunch(
        _name(kernel, signature, constants, options),
        kernel,
        signature,
        constants,
        options,
        multiplies="DOT" in constants or has_codes or has_scales,
        first_architecture=100 if has_scales else 90 if has_codes else 80,
    )


def _name(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> str:
    """The kernel, its constexprs, pointers that are absent, and types of those that are not to bfloat16."""
    named = sorted(each.name for each in kernel.params if each.is_constexpr)
    parts = [f"{name}={getattr(constants[name], 'name', constants[name])}" for name in named]
    absent = [name for name, value in constants.items() if value is None and name not in named]
    parts += [f"no {name}" for name in absent]
    parts += [f"{name} {kind}" for name, kind in signature.items() if kind[0] in "*t" and kind != "*bf16"]
    parts += [f"{number} {name.removeprefix('num_')}" for name, number in options.items()]
    return f"{kernel.fn.__name__}: {', '.join(parts)}"


def _type_of(value: Any, *, specializes: bool) -> str:
    """Triton's name of an argument's type; `:16` where a launch finds that 16 divides it."""
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    if not isinstance(value, int):  # a descriptor of a tensor
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    wide = "i32" if -(2**31) <= value < 2**31 else "i64"
    return f"{wide}:16" if specializes and value % 16 == 0 else wide
