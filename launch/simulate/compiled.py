"""What a GPU would compile: kernels by the key under which Triton keeps them in a process.

How it works: Triton compiles a kernel again for other dtypes, other constants, and other facts of its arguments (a
pointer or a number that 16 divides, a number that is 1). Its own binder says which, for an H100. A fake tensor has no
address: its place in its storage stands for it, since allocators align storages.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

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
