"""Operators of Triton's interpreter that look for no common type or shape where operands have one.

Most of what `interpreter.py` leaves are operators: each unwraps its operands three times, looks for the type that both are
cast to, casts, copies each operand to the shape of both, and asks the builder. What follows from two types is looked up here, and
the builder is asked as soon as both have one: numpy repeats a number or a row by the same rules. The builder's methods are those
of before, so what watches them (`tests/kernels/watch`) sees every operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.language import core
from triton.runtime import interpreter

# Types that stay what they are when both operands of an operation have them, also of a division.
_KEPT = frozenset({"fp32", "fp64", "int1", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))})


def quick_operands(slowly: Callable[..., Any]) -> Callable[..., Any]:
    """Operands of one type need no cast, and a number becomes a block once for each shape and type of the other operand."""
    tensor = core.tensor
    blocks: dict[Any, Any] = {}
    common: dict[Any, tuple[Any, ...]] = {}

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
            key = (left.dtype.name, right.dtype.name, how, *named.items())
            if key[0] in _KEPT and key[0] == key[1]:
                return self.broadcast_impl_value(left, right)
            if key not in common:
                pair = slowly(self, left, right, *how, **named)
                # None stays as it is: a pointer, or what is added to one.
                common[key] = tuple(
                    now.dtype if now.dtype.name != before.dtype.name else None
                    for now, before in zip(pair, (left, right))
                )
                return pair
            ours, theirs = common[key]
            left = left if ours is None else self.cast(left, ours)
            right = right if theirs is None else self.cast(right, theirs)
            return self.broadcast_impl_value(left, right)
        elif first is tensor and (second is int or second is float):
            return block_of(self, right, left, False, how, named)
        elif second is tensor and (first is int or first is float):
            return block_of(self, left, right, True, how, named)[::-1]
        return slowly(self, left, right, *how, **named)

    return operands


def quick_broadcast(slowly: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks of one shape stay as they are, and a number becomes a block without a type of its own."""
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


def quick_binary_op(slowly: Callable[..., Any]) -> Callable[..., Any]:
    """As numpy computes it, but for truth values and results that are too wide for their type."""
    handle = interpreter.TensorHandle

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        ours, theirs = lhs.data, rhs.data
        if ours.dtype.char == theirs.dtype.char == "?":
            return slowly(self, lhs, rhs, op)
        found, dtype = op(ours, theirs), lhs.dtype
        if type(dtype) is not core.dtype or found.itemsize * 8 > max(8, dtype.primitive_bitwidth):
            return slowly(self, lhs, rhs, op)
        return handle(found, dtype)

    return binary_op


def quick_broadcast_to(slowly: Callable[..., Any]) -> Callable[..., Any]:
    """A copy, which takes numpy a tenth of the time of a view with strides of 0."""

    def broadcast_to(self: Any, arg: Any, shape: Any) -> Any:
        data = np.empty([int(length) for length in shape], dtype=arg.data.dtype)
        data[...] = arg.data
        return interpreter.TensorHandle(data, arg.dtype.scalar)

    return broadcast_to


def quick_expand_dims(slowly: Callable[..., Any]) -> Callable[..., Any]:
    """The view that `np.expand_dims` makes after it has checked the axis."""
    index = [(slice(None),) * axis + (None,) for axis in range(8)]

    def expand_dims(self: Any, arg: Any, axis: int) -> Any:
        return interpreter.TensorHandle(arg.data[index[axis]], arg.dtype.scalar)

    return expand_dims


def quick_make_tensor(slowly: Callable[..., Any]) -> Any:
    """The class itself."""
    return core.tensor  # a class, to which Python passes no `self`


def quick_cast(slowly: Callable[..., Any]) -> Callable[..., Any]:
    """A value of the wanted type as it is, and integers by the one method that all of them take."""
    integers = {name: name[0] == "i" for name in _KEPT if "int" in name and name != "int1"}
    block_type, tensor = core.block_type, core.tensor

    def cast(self: Any, value: Any, dtype: Any, fp_downcast_rounding: Any = None) -> Any:
        kind = value.type
        source, wanted = kind.scalar, dtype.scalar
        if source is wanted:
            return value
        is_signed = integers.get(source.name)
        if is_signed is None or wanted.name not in integers or source.name == wanted.name or fp_downcast_rounding:
            return slowly(self, value, dtype, fp_downcast_rounding)
        if type(kind) is block_type:
            wanted = block_type(wanted, kind.shape)
        return tensor(self.builder.create_int_cast(value.handle, wanted, is_signed), wanted)

    return cast


_INTEGERS = ("int32", "int64")
_DIVIDES = (False, False, True, True)


def _asked(of_floats: str, of_integers: str, *types: str) -> dict[str, str]:
    """Methods of the builder by the type of both operands."""
    methods = {name: f"create_{of_integers}" for name in types or _INTEGERS}
    return methods | ({"fp32": f"create_{of_floats}"} if of_floats else {})


# What operators ask of the builder where both operands have a type, how operands are brought to one, and whether the result is
# a truth value.
DIRECT: dict[str, tuple[dict[str, str], tuple[bool, ...], bool]] = {
    "__add__": (_asked("fadd", "add"), (True, True), False),
    "__sub__": (_asked("fsub", "sub"), (True, False), False),
    "__mul__": (_asked("fmul", "mul"), (), False),
    "__truediv__": ({"fp32": "create_fdiv"}, _DIVIDES, False),
    "__floordiv__": (_asked("", "sdiv"), _DIVIDES, False),
    "__mod__": (_asked("frem", "srem"), _DIVIDES, False),
    "__and__": (_asked("", "and", "int1", *_INTEGERS), (), False),
    "__or__": (_asked("", "or", "int1", *_INTEGERS), (), False),
    "__lt__": (_asked("fcmpOLT", "icmpSLT"), (), True),
    "__le__": (_asked("fcmpOLE", "icmpSLE"), (), True),
    "__gt__": (_asked("fcmpOGT", "icmpSGT"), (), True),
    "__ge__": (_asked("fcmpOGE", "icmpSGE"), (), True),
    "__eq__": (_asked("fcmpOEQ", "icmpEQ"), (), True),
}
DIRECT |= {f"__r{name[2:]}": DIRECT[name] for name in ("__add__", "__sub__", "__mul__", "__truediv__")}


def quick_direct(name: str, slowly: Callable[..., Any], given: Any) -> Callable[..., Any]:
    """An operator that looks for no common type where operands have one, and leaves it to numpy to repeat numbers."""
    (methods, how, is_truth), tensor, builder = DIRECT[name], core.tensor, given.builder
    adds, is_turned = methods.get("fp32") == "create_fadd", name.startswith("__r")

    def operate(first: Any, second: Any, **named: Any) -> Any:
        kind = type(second)
        if kind is not tensor:
            if kind is not int and kind is not float:
                return slowly(first, second, **named)
            ours = theirs = ""
        else:
            ours, theirs = first.dtype.name, second.dtype.name
        left, right = (second, first) if is_turned else (first, second)
        is_place = adds and theirs in _INTEGERS and type(left.dtype) is core.pointer_type
        if kind is not tensor or (ours != theirs and not is_place):
            left, right = given.binary_op_type_checking_impl(left, right, *how)
            ours, theirs = left.dtype.name, right.dtype.name
        result = _joined(left.type, right.type)
        if result is not None and is_place:
            return tensor(builder.create_addptr(left.handle, right.handle), result)
        if result is None or ours != theirs or ours not in methods:
            return slowly(first, second, **named)
        result = result.with_element_ty(core.int1) if is_truth else result
        return tensor(getattr(builder, methods[ours])(left.handle, right.handle), result)

    return operate


_JOINED: dict[tuple[int, int], Any] = {}


def _joined(ours: Any, theirs: Any) -> Any:
    """The type, with the first one's elements, of what numpy makes of two blocks or numbers; None where they do not fit."""
    block_type = core.block_type
    if ours is theirs or type(theirs) is not block_type:
        return ours
    if type(ours) is not block_type:
        return block_type(ours, theirs.shape)
    if ours.shape is theirs.shape:
        return ours
    key = id(ours.shape), id(theirs.shape)
    if key not in _JOINED:
        pair = ours.shape.values, theirs.shape.values
        fits = len(pair[0]) == len(pair[1]) and all(a == b or 1 in (a, b) for a, b in zip(*pair))
        # With both, so that no other shape gets their place.
        _JOINED[key] = [max(each) for each in zip(*pair)] if fits else None, ours.shape, theirs.shape
    lengths = _JOINED[key][0]
    return None if lengths is None else block_type(ours.element_ty, lengths)


def quick_semantic_expand_dims(slowly: Callable[..., Any]) -> Callable[..., Any]:
    """One dim more."""

    def expand_dims(self: Any, value: Any, axis: int) -> Any:
        kind = value.type
        if type(kind) is not core.block_type or not 0 <= axis <= len(kind.shape.values):
            return slowly(self, value, axis)
        lengths = list(kind.shape.values)
        lengths.insert(axis, 1)
        return core.tensor(
            self.builder.create_expand_dims(value.handle, axis), core.block_type(kind.element_ty, lengths)
        )

    return expand_dims


def quick_cast_impl(slowly: Callable[..., Any]) -> Callable[..., Any]:
    """As numpy casts, but for bfloat16, which it does not know."""

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        wanted = dtype.scalar
        if source.dtype.name == "bf16" or wanted.name == "bf16":
            return slowly(self, source, dtype)
        return interpreter.TensorHandle(source.data.astype(interpreter._get_np_dtype(wanted)), wanted)

    return cast_impl
