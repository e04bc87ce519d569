"""The forms of kernels that blocks of the presets launch, recorded from one block of each kind on each preset's own layout.

How: a block passes forward and backward on the meta device, as the plan measures it; bodies of operations run, so that every
launch happens with its real types, constants and tiles, is noted and does nothing. Launches are one form where the kernel, its
constexprs, types of pointers, warps and stages are the same; whether an integer is 1, or 16 divides it, is taken from the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.cases.operation import KernelLaunch
from amfm.launch.plan.blocks.cut import cut_of
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.measured import Cut, pass_block, takes_kernels
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import resolve_stages

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
BLACKWELL, CODES = "scaled_kernels", "fp8e4nv"


def record_preset(path: Path) -> dict[str, KernelLaunch]:
    """Every form that the blocks of a preset launch, by name: in all its stages, and by its recipe of low precision."""
    config, found = load_checked(path, ()), dict[str, KernelLaunch]()
    passed: list[tuple[ModelConfig, str, Cut]] = []
    for stage in resolve_stages(config):
        run = stage.config
        for letter, is_narrow in kinds_of(run):
            block = run.model, letter, cut_of(run, smallest_layout(run), letter, 1.0, is_narrow=is_narrow)
            if block not in passed:
                pass_block(*block, partial(note_launch, found))
                passed.append(block)
    return found


def kinds_of(run: RunConfig) -> Iterator[tuple[str, bool]]:
    """Symbols of the pattern whose kernels are Triton's, each with whether its products are by a recipe."""
    narrow = {run.model.built_letters[index] for index in run.low_precision.narrow_blocks(run.model.letters)}
    for letter in dict.fromkeys(run.model.letters):
        if takes_kernels(run.model, letter):
            yield letter, False
            if letter in narrow:
                yield letter, True


def smallest_layout(run: RunConfig) -> Layout:
    """The layout that a run declares, on as few ranks as hold it once."""
    axes = run.parallel
    return Layout.of(run, axes.tensor * axes.context * axes.pipeline * axes.expert)


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
    return KernelLaunch(
        _name(kernel, signature, constants, options),
        kernel,
        signature,
        constants,
        options,
        multiplies="DOT" in constants or has_codes,
        first_architecture=100 if kernel.fn.__module__.endswith(BLACKWELL) else 90 if has_codes else 80,
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
