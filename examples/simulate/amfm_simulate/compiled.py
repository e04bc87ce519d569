"""What a GPU would compile: kernels by the key under which Triton keeps them in a process.

How it works: Triton compiles a kernel again for other dtypes, other constants, and other facts of its arguments (a
pointer or a number that 16 divides, a number that is 1). Its own binder says which, for an H100. A fake tensor has no
address: its place in its storage stands for it, since allocators align storages.

Run the bodies of amfm's Triton operations on fake tensors, so that their allocations and launches are traced.

How it works: normally a fake tensor mode calls an operation's fake function, which only states shapes, and its
temporary buffers stay unseen. Here the Python body runs too, on fake tensors inside the tracer; kernel launches are
counted and do nothing. The fake function's answer is compared with the body's: if they disagree, torch.compile and this
simulation would see another program than the GPU runs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from amfm.kernels.common.custom_op import find_body

_H100 = GPUTarget("cuda", 90, 32)


class CompiledKernels:
    """The kernels that were launched so far, and those of them that were first launched after `close`."""

    def __init__(self) -> None:
        self.backend = make_backend(_H100)
        self.binders: dict[int, Any] = {}
        self.known: set[str] = set()
        self.is_closed = False
        self.late: list[str] = []

    def close(self) -> None:
        """From now on nothing should be compiled."""
        self.is_closed = True

    def num_first(self) -> int:
        """How many were compiled before `close`."""
        return len(self.known) - len(self.late)

    def launch(self, kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note a launch of a kernel, which compiles it where it has another key than those before it."""
        binder = self.binders.get(id(kernel))
        if binder is None:
            binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)
            self.binders[id(kernel)] = binder
        taken = [stand_in(value) for value in arguments]
        _, specialization, options = binder(*taken, **{name: stand_in(value) for name, value in named.items()})
        facts = ", ".join(
            f"{parameter.name}: {given[0] if given[0] != 'constexpr' else given[1]}{'' if given[0] == 'constexpr' else given[1] or ''}"
            for parameter, given in zip(kernel.params, specialization, strict=True)
        )
        key = f"{kernel.fn.__name__}({facts}) {options}"
        if key in self.known:
            return
        self.known.add(key)
        if self.is_closed:
            self.late.append(key)


class Pointer:
    """A tensor as Triton's binder sees one."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.place = 256 + int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        """Its address, as far as alignment goes."""
        return self.place


def stand_in(value: Any) -> Any:
    """What is given to the binder instead of an argument."""
    return Pointer(value) if isinstance(value, Tensor) else value


class BodyRunner:
    """Runs operations of the namespace `amfm` and collects in `mismatches` where fake function and body disagree."""

    def __init__(self) -> None:
        self.compared: Counter[str] = Counter()
        self.mismatches: dict[str, str] = {}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any], mode: Any) -> Any:
        """Result of the body inside the dispatch mode; of the fake function where an operation has no Triton body."""
        body = find_body(func)
        expected = func(*args, **kwargs)
        if body is None:
            return expected
        with mode:
            given = body(*args, **kwargs)
        self.compare(str(func), expected, given)
        return given

    def compare(self, name: str, expected: Any, given: Any) -> None:
        """Compare shape, strides, dtype and device of every result; note the results that differ."""
        self.compared[name] += 1
        pairs = zip(as_tuple(expected), as_tuple(given), strict=True)
        for place, (said, found) in enumerate(pairs):
            if describe(said) != describe(found):
                self.mismatches[f"{name}[{place}]"] = f"fake function {describe(said)}, body {describe(found)}"


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Results of an operation as a tuple, a single one too."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def describe(value: Any) -> str:
    """What a fake function must get right about a tensor: shape, strides, dtype and device."""
    if not isinstance(value, Tensor):
        return str(value)
    return f"{tuple(value.shape)} strides {value.stride()} {value.dtype} on {value.device}"
