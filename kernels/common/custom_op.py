"""What autograd and the compiler have to know of a custom operation, taken from the names of its arguments.

A backward operation says by its parameters what it needs: `d_y` is the gradient of the output y, a name of the forward
operation's inputs is that input, and the name of another output is that output. So `differentiate` knows what to keep, which
outputs take a gradient, and whose gradients the results are; a gradient is packed, in shape and dtype like its input. One that
may land in a sum (weight_gradients.py) has two more arguments there: `weight_sum`, which backward overwrites, or adds to where
`weight_adds` says so; its result is empty then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS, CustomOpDef

from amfm.kernels.common.weight_gradients import gradient_sum_of
from amfm.kernels.runtime import compiling  # noqa: F401  # first: it marks the custom operations

# Of backward's results and of what was kept, by name: gradients by the names of the inputs.
Unpack = Callable[[tuple[Tensor, ...], Any], dict[str, Tensor | None]]


def fake_of(operation: CustomOpDef) -> Callable[[Callable[[Any], Any]], None]:
    """Decorates what gives an operation's results on fake tensors, out of its arguments as attributes of one object."""
    names = _names(operation)

    def register(results: Callable[[Any], Any]) -> None:
        operation.register_fake(lambda *given: results(SimpleNamespace(**dict(zip(names, given, strict=True)))))

    return register


@lru_cache(maxsize=1024)
def find_body(func: Any) -> Callable[..., Any] | None:
    """The Python function behind a custom operation made of Triton kernels, None for any other operation."""
    definition = OPDEFS.get(f"{func.namespace}::{func._opname}") if func.namespace == "amfm" else None
    return definition._init_fn if definition is not None and "triton" in func._opname else None


def gradients_like(backward: CustomOpDef, gradients: Sequence[str]) -> None:
    """Fake results of a backward operation: packed memory like each of these arguments, empty for one that is absent."""

    @fake_of(backward)
    def _(given: Any) -> Tensor | tuple[Tensor, ...]:
        inputs = [(getattr(given, name), is_accumulated(given, name)) for name in gradients]
        first = inputs[0][0]
        like = tuple(first.new_empty(0) if x is None or landed else x.new_empty(x.shape) for x, landed in inputs)
        return like if len(like) > 1 else like[0]


def is_accumulated(given: Any, name: str) -> bool:
    """Whether the gradient of this argument lands in a sum, by a backward operation's arguments."""
    return getattr(given, f"{name}_sum", None) is not None


def differentiate(
    forward: CustomOpDef,
    backward: CustomOpDef,
    *,
    outputs: Sequence[str],
    gradients: Sequence[str] = (),
    unpack: Unpack | None = None,
) -> None:
    """Make `backward` the gradient of `forward`.

    outputs: names of forward's results. gradients: the inputs whose gradients backward returns, in its order; that of an
    absent input is empty, in the dtype of the first. unpack: for a backward whose results are others, which also needs
    `fake_of`. Where a gradient is missing that backward must have, it gets zeros; where all are, nothing is computed.
    """
    names, needed = _names(forward), _names(backward)
    landing = [name for name in names if f"{name}_sum" in needed]
    places = {f"{name}_{part}" for name in landing for part in ("sum", "adds")}
    optional = {each.name for each in backward._opoverload._schema.arguments if each.type.kind() == "OptionalType"}
    arriving = [name if (name := f"d_{output}") in needed else None for output in outputs]
    unknown = set(needed) - set(names) - set(outputs) - set(arriving) - places
    assert not unknown, (
        f"{backward}: {sorted(unknown)} are neither inputs nor outputs of {forward}, nor their gradients"
    )
    if unpack is None:
        gradients_like(backward, gradients)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        known = dict(zip(names, inputs, strict=True)) | dict(zip(outputs, results, strict=True))
        kept = {name: known[name] for name in needed if name in known}
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        ctx.tensors, ctx.others = list(tensors), {name: kept[name] for name in kept if name not in tensors}
        ctx.save_for_backward(*tensors.values())
        ctx.totals = {name: total for name in landing if (total := gradient_sum_of(known[name])) is not None}
        ctx.made = [(result.shape, result.dtype, result.device) for result in results]
        ctx.absent = {name for name in gradients if known[name] is None}
        ctx.mark_non_differentiable(*(result for result, d in zip(results, arriving) if d is None))
        ctx.set_materialize_grads(False)

    def gradient(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(d is None for d, name in zip(given, arriving) if name):
            return (None,) * len(names)
        kept = ctx.others | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        for d, name, (shape, dtype, device) in zip(given, arriving, ctx.made, strict=True):
            if name:
                kept[name] = torch.zeros(shape, dtype=dtype, device=device) if d is None and name not in optional else d
        for name in landing:
            taken = ctx.totals[name].take() if name in ctx.totals else (None, False)
            kept[f"{name}_sum"], kept[f"{name}_adds"] = taken
        found = backward(*(kept[name] for name in needed))
        results = found if isinstance(found, tuple) else (found,)
        if unpack is None:
            into = {name: d for name, d in zip(gradients, results, strict=True) if name not in ctx.absent}
        else:
            into = unpack(results, SimpleNamespace(**kept))
        return tuple(None if name in ctx.totals else into.get(name) for name in names)

    forward.register_autograd(gradient, setup_context=keep)


def _names(operation: CustomOpDef) -> list[str]:
    """Names of an operation's arguments."""
    return [argument.name for argument in operation._opoverload._schema.arguments]
