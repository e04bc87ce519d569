"""Compiles a Triton kernel for a GPU that this machine need not have, and reads what it will cost there.

Why: spilled registers and shared memory decide whether a kernel is fast or runs at all, and both are known only
from the compiler. So they can be checked on machines without a GPU, for every launch that `recorded` finds.

Finds products of a compiled kernel that take the transpose of another product's result.

Triton 3.4 to 3.7.0 makes wrong numbers of that form on Hopper, so no kernel of ours has it. It is searched in Triton's
own representation of the kernel, after inlining and simplification, because there a sum may have become part of a
product that the source shows apart.

Compiles every kernel in bfloat16 for one architecture, in many processes at once.

It finds what does not compile or spills before anything runs, and so tells a broken compiler from a broken kernel.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from amfm.kernels.runtime.backend import INTERPRETED

if TYPE_CHECKING:
    from amfm.kernels.proof.recorded import KernelLaunch


def compile_all(
    cases: str, architecture: int, operations: Sequence[str], jobs: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each launch of these operations of the module `cases`: `kernel`, `operation` and its resources, or `fault`.

    seconds: after so long without another result what is left counts as not compiled, and is stopped.
    """
    if not operations:
        return
    left: set[tuple[str, str]] = set()
    # Compiled, not interpreted, whatever this process does; "spawn", for a fork would share Triton's threads.
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            named = pool.map_async(functools.partial(_names, cases, architecture), operations).get(timeout=seconds)
            left.update((operation, name) for operation, names in zip(operations, named) for name in names)
            results = pool.imap_unordered(functools.partial(_compile, cases, architecture), sorted(left))
            for _ in range(len(left)):
                try:
                    key, row = results.next(timeout=seconds)
                except multiprocessing.TimeoutError:
                    break
                left.discard(key)
                yield row
    finally:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
    for operation, name in sorted(left):
        fault = f"did not compile in {seconds:g} s, or its process died"
        yield {"kernel": name, "operation": operation, "fault": fault}


@functools.cache
def _record(cases: str, operation: str) -> dict[str, KernelLaunch]:
    """What an operation launches, by name; kept, since a process compiles many."""
    from amfm.kernels.proof.recorded import record

    return record(importlib.import_module(cases).OPERATIONS[operation])


def _names(cases: str, architecture: int, operation: str) -> list[str]:
    """Names of an operation's launches that this architecture has instructions for, in a process of the pool."""
    launches = _record(cases, operation).items()
    return [name for name, launch in launches if launch.first_architecture <= architecture]


def _compile(cases: str, architecture: int, work: tuple[str, str]) -> tuple[tuple[str, str], dict[str, Any]]:
    """Compile one launch of an operation, in a process of the pool."""
    from amfm.kernels.proof.ahead_of_time import compile_ahead

    operation, name = work
    launch = _record(cases, operation)[name]
    row: dict[str, Any] = {"kernel": launch.name, "operation": operation, "fault": ""}
    try:
        compiled = compile_ahead(launch.kernel, launch.signature, launch.constants, architecture, **launch.options)
    except (TritonError, RuntimeError, ValueError) as error:
        tile = {
            **{name: value for name, value in launch.constants.items() if name.startswith("BLOCK")},
            **launch.options,
        }
        return work, row | {"fault": f"does not compile with {tile}: {' '.join(str(error).split())[:500]}"}
    return work, row | {
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "shared_bytes": compiled.shared_bytes,
        "wgmma": compiled.uses_wgmma,
    }


_NAME = r"%[\w$.-]+(?:#\d+)?"
_RESULT = re.compile(r"^(%[\w$.-]+)(?::\d+)? = (\S+)(.*)$")
# What becomes of a matrix of products here is no such matrix any more: sums over one of its dimensions, or nothing of it.
_ENDS = ("tt.load", '"tt.reduce"', "tt.reduce", "tt.call", "arith.cmpf", "arith.cmpi")
_CLEAN, _PRODUCT, _TRANSPOSED = range(3)


def find_transposed_products(ttir: str) -> list[str]:
    """List the results of `tt.dot` in a kernel's TTIR that take, as operand or sum, a transposed product's result.

    A value counts as a product's result until it is reduced or stored; elementwise operations, selections, layouts and
    loops pass it on.
    """
    flows, transposes, products = _read_flows(ttir)
    state: dict[str, int] = defaultdict(int)
    for name in products:
        state[name] = _PRODUCT
    moved = True
    while moved:
        moved = False
        for result, operands in flows.items():
            reached = max((state[operand] for operand in operands), default=_CLEAN)
            if result in transposes and reached == _PRODUCT:
                reached = _TRANSPOSED
            if reached > state[result]:
                state[result], moved = reached, True
    return sorted(name for name, operands in products.items() if any(state[each] == _TRANSPOSED for each in operands))


def _read_flows(ttir: str) -> tuple[dict[str, set[str]], set[str], dict[str, list[str]]]:
    """Read which values each value is made of, which values are transposes, and the operands of each product."""
    flows: dict[str, set[str]] = defaultdict(set)
    transposes: set[str] = set()
    products: dict[str, list[str]] = {}
    blocks: list[tuple[str, list[str]]] = []  # of the loops and branches around a line: result, and what it carries
    for line in _lines(ttir):
        found = _RESULT.match(line)
        name, operation, rest = found.groups() if found else ("", line.split(" ", 1)[0], line)
        if operation == "tt.dot":
            products[name] = re.findall(_NAME, rest)[:3]
        elif operation == "scf.for":
            carried = re.findall(rf"({_NAME}) = ({_NAME})", rest.partition("iter_args(")[2].partition(")")[0])
            for index, (argument, initial) in enumerate(carried):
                flows[argument].add(initial)
                flows[_result(name, index, len(carried))].add(argument)
            blocks.append((name, [argument for argument, _ in carried]))
            continue
        elif operation == "scf.yield" and blocks:
            name, carried_names = blocks[-1]
            values = re.findall(_NAME, rest.partition(" : ")[0])
            for index, value in enumerate(values):
                flows[_result(name, index, len(values))].add(value)
                if carried_names:
                    flows[carried_names[index]].add(value)
        elif name and operation not in _ENDS:
            flows[name].update(re.findall(_NAME, rest))
            if operation == "tt.trans":
                transposes.add(name)
        if line.startswith("}") and not line.endswith("{"):  # `} else {` continues with the branch's block
            blocks.pop()
        elif line.endswith("{") and not line.startswith("}"):
            blocks.append((name, []))
    return flows, transposes, products


def _result(name: str, index: int, count: int) -> str:
    """Name of one of the values that a loop or branch returns."""
    return name if count == 1 else f"{name}#{index}"


def _lines(ttir: str) -> Iterator[str]:
    """Lines of the text without locations, comments and labels."""
    for line in ttir.splitlines():
        bare = re.sub(r"\s+loc\(.*\)$", "", line).strip()
        if bare and not bare.startswith(("#", "//", "^")):
            yield bare


_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class CompiledKernel:
    """What a kernel takes on a GPU: registers and spilled bytes per thread, bytes of shared memory a program.

    uses_block_scales: tensor cores scale blocks of operands themselves, as Blackwell's do. transposed_products: products that take the transpose of another's result (`amfm.kernels.proof.ahead_of_time`).
    widest_load_bytes: what one load instruction fetches at most, 16 where rows are known to be aligned.
    """

    name: str
    architecture: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    uses_wgmma: bool
    uses_block_scales: bool
    transposed_products: tuple[str, ...]
    widest_load_bytes: int


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> CompiledKernel:
    """Compile a `triton.jit` kernel for sm_80, sm_90 or sm_100 (`architecture` 80, 90, 100) without a GPU.

    signature: Triton's type of each argument that is not a constant, such as "*bf16", "*fp32", "i32", or "i32:16" for
    an integer that 16 divides (launches find that out themselves). constants: the value of each constexpr, and None for
    an absent pointer. Pointers count as aligned to 16 bytes, which PyTorch's allocator grants.

    Raises RuntimeError in the interpreter, ValueError for arguments that are missing or unknown.
    """
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; start Python without it")
    wanted = list(kernel.arg_names)
    given = set(signature) | set(constants)
    if given != set(wanted) or set(signature) & set(constants):
        missing, unknown = sorted(set(wanted) - given), sorted(given - set(wanted))
        twice = sorted(set(signature) & set(constants))
        raise ValueError(f"{kernel.__name__}: arguments missing {missing}, unknown {unknown}, given twice {twice}")
    types = {name: signature.get(name, "constexpr").removesuffix(":16") for name in wanted}
    places = {(wanted.index(name),): value for name, value in constants.items()}
    # Known divisibility is what lets the compiler use wide loads; a launch on a GPU finds it from the values.
    divided = [name for name, kind in signature.items() if kind.startswith("*") or kind.endswith(":16")]
    aligned = {(wanted.index(name),): [["tt.divisibility", 16]] for name in divided}
    source = ASTSource(kernel, types, constexprs=places, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spills = _read_usage(compiled.asm["cubin"])
    return CompiledKernel(
        kernel.__name__,
        architecture,
        registers,
        spills,
        int(compiled.metadata.shared),
        "wgmma" in compiled.asm["ptx"],
        "block_scale" in compiled.asm["ptx"],
        tuple(find_transposed_products(compiled.asm["ttir"])),
        _find_widest_load(compiled.asm["ptx"]),
    )


def _find_widest_load(ptx: str) -> int:
    """Bytes of the widest load from global memory, asynchronous copies to shared memory among them."""
    vectors = re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    copies = re.findall(r"cp\.async[.\w:]* \[[^\]]+\], \[[^\]]+\], (0x[0-9a-f]+|\d+)", ptx)
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in vectors] + [int(size, 0) for size in copies]
    return max(sizes, default=0)


def _read_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack (what spilled) a thread, read by the cuobjdump that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, f"cuobjdump printed no usage: {text!r}"
    return int(found.group(1)), int(found.group(2))
