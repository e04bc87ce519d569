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
from tests.kernels.quick.operators import (
    DIRECT,
    quick_binary_op,
    quick_broadcast,
    quick_broadcast_to,
    quick_cast,
    quick_cast_impl,
    quick_direct,
    quick_expand_dims,
    quick_make_tensor,
    quick_operands,
    quick_semantic_expand_dims,
)

Make = Callable[[Callable[..., Any]], Callable[..., Any]]

# Values that need no unwrapping.
_PLAIN = frozenset({int, float, bool, str, type(None), core.tensor, core.dtype, core.pointer_type, core.block_type})
_BUILTIN = core.builtin(lambda: None).__code__  # of what the decorator of Triton's builtins returns


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


def _handle(slowly: Callable[..., None]) -> Callable[..., None]:
    plain = core.dtype
    most: dict[str, int] = {}

    def make(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        if type(dtype) is plain:
            found = most.get(dtype.name)
            if found is None:
                found = most[dtype.name] = max(8, dtype.primitive_bitwidth) // 8
            if data.itemsize > found:
                slowly(self, data, dtype)  # which rejects it
        elif type(dtype) is not core.pointer_type:
            slowly(self, data, dtype)
        self.data = data
        self.dtype = dtype
        self.attr = {} if attr is None else attr

    return make


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


def _same_or(equal: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: True if self is other else equal(self, other)


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
        if obj is core.tensor and name in DIRECT and not builder.options.sanitize_overflow:
            scope.set_attr(obj, name, quick_direct(name, call, given))
        else:
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
    (interpreter.TensorHandle, "__init__", _handle),
    (interpreter.InterpreterBuilder, "binary_op", quick_binary_op),
    (interpreter.InterpreterBuilder, "create_broadcast", quick_broadcast_to),
    (interpreter.InterpreterBuilder, "create_expand_dims", quick_expand_dims),
    (interpreter.InterpreterBuilder, "cast_impl", quick_cast_impl),
    (semantic.TritonSemantic, "cast", quick_cast),
    (semantic.TritonSemantic, "expand_dims", quick_semantic_expand_dims),
    (semantic.TritonSemantic, "make_tensor", quick_make_tensor),
    (interpreter, "_get_np_dtype", _np_dtype),
    (interpreter, "_patch_attr", _patch_attr),
    (interpreter, "_validate_np_data_size", _validate_size),
    (semantic.TritonSemantic, "broadcast_impl_value", quick_broadcast),
    (semantic.TritonSemantic, "binary_op_type_checking_impl", quick_operands),
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
