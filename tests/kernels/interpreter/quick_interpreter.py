"""Triton's interpreter with less bookkeeping: the same operations of numpy on the same numbers, in about half of the time.

Nearly all of its time is Python that makes types. Each result has a `block_type`, whose shape is checked once more, and a
`tensor`, which wraps each length once more. Shapes are few, so what follows from one is kept here. So are blocks of a number
of the kernel's text, of which each operation made a new one. For each sum, difference and product of integers the
interpreter computes in int64 whether it overflows, for an assertion that it leaves out (`device_assert` without
`InterpreterOptions.debug`): eight further operations without an effect. And it puts its functions into Triton's modules at
every launch and at every call of a device function; here they stay there to the end of the block.

Nothing here knows a kernel. A part whose name a version of Triton lacks is left out. `test_quick_interpreter.py` compares
bits and messages with those of the interpreter as it is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from triton import language
from triton.language import core, semantic
from triton.runtime import interpreter

from amfm.kernels.runtime.interpreter import replace_methods

Make = Callable[[Callable[..., Any]], Callable[..., Any]]

# Values that need no unwrapping.
_PLAIN = frozenset({int, float, bool, str, type(None), core.tensor, core.dtype, core.pointer_type, core.block_type})
_BUILTIN = core.builtin(lambda: None).__code__  # of what the decorator of Triton's builtins returns

# Types that stay what they are when both operands of an operation have them, also of a division.
_KEPT = frozenset({"fp32", "fp64", "int1", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))})


class _Shape:
    """What follows from the lengths of a block."""

    def __init__(self, lengths: tuple[int, ...], numel: int) -> None:
        self.block = core.tuple(lengths)
        self.numel = numel
        self.name = str(self.block)
        self.tensor = core.tuple([core.constexpr(length) for length in lengths])
        self.tensor_numel = core.constexpr(numel)


_SCALAR = _Shape((), 1)
_SHAPES: dict[tuple[int, ...], _Shape] = {}


def _unwrap(slowly: Callable[[Any], Any]) -> Callable[[Any], Any]:
    constexpr = core.constexpr

    def unwrap(value: Any) -> Any:
        kind = type(value)
        if kind is constexpr:
            return value.value
        return value if kind in _PLAIN else slowly(value)

    return unwrap


def _block_type(init: Callable[..., None]) -> Callable[..., None]:
    def make(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if type(shape) is core.tuple else shape
        lengths = tuple([value.value if type(value) is core.constexpr else value for value in values])
        found = _SHAPES.get(lengths)
        if found is None:
            init(self, element_ty, shape)  # checks it
            found = _SHAPES[lengths] = _Shape(lengths, self.numel)
        self.element_ty = element_ty
        self.shape = found.block
        self.numel = found.numel
        self.name = f"<{found.name}, {element_ty.name}>"
        self.quick = found

    return make


def _tensor(slowly: Callable[..., None]) -> Callable[..., None]:
    block_type = core.block_type

    def make(self: Any, handle: Any, type: Any) -> None:
        found = getattr(type, "quick", None) if type.__class__ is block_type else _SCALAR
        if found is None:  # a type from before
            slowly(self, handle, type)
            return
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        self.shape = found.tensor
        self.numel = found.tensor_numel

    return make


def _np_dtype(slowly: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}
    pointer, block = np.dtype(np.uint64), core.block_type

    def find(dtype: Any) -> Any:
        if type(dtype) is block:
            dtype = dtype.element_ty
        if type(dtype) is core.pointer_type:
            return pointer
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = slowly(dtype)
        return found

    return find


def _validate_size(slowly: Callable[..., bool]) -> Callable[..., bool]:
    plain = core.dtype
    bytes_of: dict[str, int] = {}

    def validate(array: Any, dtype: Any) -> bool:
        if type(dtype) is not plain:
            return slowly(array, dtype)
        most = bytes_of.get(dtype.name)
        if most is None:
            most = bytes_of[dtype.name] = max(8, dtype.primitive_bitwidth) // 8
        return array.itemsize <= most

    return validate


def _to_ir(slowly: Callable[..., Any]) -> Callable[..., Any]:
    known: set[str] = set()

    def to_ir(self: Any, builder: Any) -> Any:
        if type(self.element_ty) is not core.dtype:
            return slowly(self, builder)
        if self.element_ty.name not in known:
            slowly(self, builder)  # which rejects what there is no type of numpy for
            known.add(self.element_ty.name)
        return self

    return to_ir


def _operands(slowly: Callable[..., Any]) -> Callable[..., Any]:
    """Operands of one type need no cast, and a number becomes a block once for each shape and type of the other operand."""
    tensor = core.tensor
    blocks: dict[Any, Any] = {}

    def block_of(self: Any, number: Any, other: Any, number_first: bool, how: tuple[Any, ...], named: Any) -> Any:
        exact = number if number or type(number) is int else str(number)  # -0.0 is not 0.0
        key = (
            other.dtype.name,
            getattr(other.type, "quick", None),
            type(number),
            exact,
            number_first,
            how,
            *named.items(),
        )
        found = blocks.get(key)
        if found is not None:
            return other, found
        pair = (
            slowly(self, number, other, *how, **named) if number_first else slowly(self, other, number, *how, **named)
        )
        other_now, found = pair[::-1] if number_first else pair
        if other_now is other and number == number:  # was not cast, and no NaN, which is never found
            found.handle.data.flags.writeable = False
            blocks[key] = found
        return other_now, found

    def operands(self: Any, left: Any, right: Any, *how: Any, **named: Any) -> Any:
        first, second = type(left), type(right)
        if first is tensor and second is tensor:
            if left.dtype.name in _KEPT and left.dtype.name == right.dtype.name:
                return self.broadcast_impl_value(left, right)
        elif first is tensor and (second is int or second is float):
            return block_of(self, right, left, False, how, named)
        elif second is tensor and (first is int or first is float):
            return block_of(self, left, right, True, how, named)[::-1]
        return slowly(self, left, right, *how, **named)

    return operands


def _same_or(equal: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: True if self is other else equal(self, other)


def _broadcast(slowly: Callable[..., Any]) -> Callable[..., Any]:
    block_type, tensor = core.block_type, core.tensor

    def full(self: Any, scalar: Any, block: Any) -> Any:
        found = scalar.handle
        if type(found.dtype) is block_type:
            handle = self.builder.create_splat(block_type(scalar.dtype, block.shape), found)
            return tensor(handle, block_type(scalar.dtype, block.shape))
        data = np.empty(block.shape.values, dtype=interpreter._get_np_dtype(found.dtype))
        data[...] = found.data
        return tensor(
            interpreter.TensorHandle(data, found.dtype, dict(found.attr)), block_type(scalar.dtype, block.shape)
        )

    def splat(self: Any, lhs: Any, rhs: Any) -> Any:
        if type(rhs.type) is block_type:
            return (lhs, rhs) if type(lhs.type) is block_type else (full(self, lhs, rhs.type), rhs)
        return (lhs, full(self, rhs, lhs.type)) if type(lhs.type) is block_type else (lhs, rhs)

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if type(left) is not block_type or type(right) is not block_type:
            return splat(self, lhs, rhs)
        if left.shape is right.shape:
            return lhs, rhs
        ours, theirs = left.shape.values, right.shape.values
        if len(ours) != len(theirs):
            return slowly(self, lhs, rhs)
        both = [b if a == 1 else a for a, b in zip(ours, theirs)]
        if any(b not in (1, a) for a, b in zip(both, theirs)):
            return slowly(self, lhs, rhs)  # which reports the axis
        if ours != both:
            lhs = tensor(self.builder.create_broadcast(lhs.handle, both), block_type(left.scalar, both))
        if theirs != both:
            rhs = tensor(self.builder.create_broadcast(rhs.handle, both), block_type(right.scalar, both))
        return lhs, rhs

    return broadcast


def _patch_attr(slowly: Callable[..., None]) -> Callable[..., None]:
    """As the interpreter's, with one call less: the decorator of builtins only asks for what is given here."""
    shared = getattr(interpreter, "interpreter_semantic", None)  # not in Triton 3.6

    def patch(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        given = shared or semantic.TritonSemantic(builder)
        is_builtin = getattr(member, "__code__", None) is _BUILTIN
        function = member.__wrapped__ if is_builtin else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = given
            return function(*args, **kwargs)

        # A frame of the interpreter, for code that looks for the kernel's line above it (`races.py`).
        call.__code__ = in_interpreter.setdefault("call", call.__code__.replace(co_filename=interpreter.__file__))
        scope.set_attr(obj, name, call)

    in_interpreter: dict[str, Any] = {}
    return patch


def _patch_lang(patch: Callable[..., Any], stack: ExitStack) -> Callable[..., Any]:
    """A kernel sees `triton.language`; functions of Triton's own library see `triton.language.core`."""
    patched: set[str] = set()

    def patch_once(function: Callable[..., None]) -> Any:
        seen = _language_modules(function)
        if not seen or not seen <= patched:
            stack.callback(patch(function).restore)
            patched.update(seen)
        return interpreter._LangPatchScope()  # nothing to restore before the end

    return patch_once


@cache
def _language_modules(function: Callable[..., None]) -> frozenset[str]:
    """Which of the modules that the interpreter changes a function can name."""
    modules = (value for value in function.__globals__.values() if isinstance(value, ModuleType))
    return frozenset(module.__name__ for module in modules if module in (language, core))


_PARTS: list[tuple[Any, str, Make]] = [
    (core, "_unwrap_if_constexpr", _unwrap),
    (core.block_type, "__init__", _block_type),
    (core.block_type, "to_ir", _to_ir),
    (core.tensor, "__init__", _tensor),
    (core.dtype, "__eq__", _same_or),
    (core.pointer_type, "__eq__", _same_or),
    (interpreter, "_get_np_dtype", _np_dtype),
    (interpreter, "_patch_attr", _patch_attr),
    (interpreter, "_validate_np_data_size", _validate_size),
    (semantic.TritonSemantic, "broadcast_impl_value", _broadcast),
    (semantic.TritonSemantic, "binary_op_type_checking_impl", _operands),
]


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Inside, kernels are interpreted with less bookkeeping. Such blocks do not nest."""
    with ExitStack() as stack:
        for owner, name, make in _PARTS:
            if hasattr(owner, name):
                stack.enter_context(replace_methods(owner, {name: make(getattr(owner, name))}))
        builder = interpreter.interpreter_builder
        if hasattr(builder.options, "sanitize_overflow"):
            options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
            stack.enter_context(replace_methods(builder, {"options": options}))
        patch_once = _patch_lang(interpreter._patch_lang, stack)
        stack.enter_context(replace_methods(interpreter, {"_patch_lang": patch_once}))
        yield
