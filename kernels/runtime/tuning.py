"""Tiles, warps and stages of a launch, chosen by timing them on the GPU after each has computed the right numbers.

Tuning is a separate command (`amfm bench kernels --tune`), training only reads what it wrote: all ranks launch alike,
and no step waits for a candidate. A table belongs to a GPU, a Triton and a ptxas release: code of another compiler is
other code, to be verified again.

A launch that fails is put into words: the kernel, its tile, and what helps. Triton says what it lacks but not for which kernel.
Its launcher knows, and its frame is in the error's traceback: the kernel is the frame's `self`, the tile its keyword arguments."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler.errors import CompilationError
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction

from amfm.kernels.runtime.backend import INTERPRETED, triton_version
from amfm.kernels.runtime.user_cache import user_folder, write_whole

Config = Mapping[str, int]
# Tables that come with the package, and where this user's own are kept; an own entry goes first.
PACKAGE_FOLDER = Path(__file__).parents[1] / "tuned"
# Part of the names of what chooses between kernels; such an entry is timed after all tiles, after those that were chosen.
CHOICE = "backend"
# How much worse than the first candidate's a candidate's error may be: another order of additions, not other numbers.
_WORSE = 1.5


@dataclass(frozen=True)
class Environment:
    """What tuned numbers hold for."""

    card: str
    triton: str
    ptxas: str

    def file_name(self) -> str:
        """Name of the table of this GPU and these compilers."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.card}_triton-{self.triton}_ptxas-{self.ptxas}") + ".json"


@dataclass
class Table:
    """Tuned configurations of one environment, by kernel and the shape that it was compiled for."""

    environment: Environment
    configs: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def load(cls, environment: Environment, folders: Sequence[Path] | None = None) -> Table:
        """The environment's entries in all folders, those of earlier folders first; empty if there are none.

        folders: by default the user's own, if there is a home directory, and the package's.

        Raises ValueError for a file that says another environment than its name.
        """
        configs: dict[str, dict[str, int]] = {}
        if folders is None:
            folders = [folder for folder in (user_folder("tuned"), PACKAGE_FOLDER) if folder is not None]
        for folder in reversed(folders):
            path = folder / environment.file_name()
            if not path.is_file():
                continue
            stored = json.loads(path.read_text())
            if stored["environment"] != vars(environment):
                raise ValueError(f"{path} holds the table of {stored['environment']}, not of {environment}; delete it")
            configs |= stored["configs"]
        return cls(environment, configs)

    def save(self, folder: Path | None = None) -> Path:
        """Write the table, whole or not at all, to the user's own folder unless another is given; returns where.

        Raises RuntimeError if no folder is given and the machine has no home directory.
        """
        folder = folder or user_folder("tuned")
        if folder is None:
            raise RuntimeError("there is no home directory to keep tuned tiles in; set HOME or XDG_CACHE_HOME")
        path = folder / self.environment.file_name()
        write_whole(path, {"environment": vars(self.environment), "configs": self.configs})
        return path


@dataclass
class _Session:
    """What a tuning in progress forces on kernels, and what they have asked for."""

    forced: dict[str, Config] = field(default_factory=dict)
    asked: dict[str, tuple[Config, ...]] = field(default_factory=dict)


_SESSIONS: list[_Session] = []
# What all ranks of a run have agreed on, in place of what this machine's files say.
_ADOPTED: list[Table] = []
# What `kept_until_retuned` keeps, to be cleared.
_FORGET: list[Callable[[], None]] = []


def config_for(kernel: str, shape: Sequence[object], candidates: Sequence[Config], device: torch.device) -> Config:
    """The configuration for a launch of `kernel`, compiled for `shape`, on `device`.

    The first candidate in the interpreter, in PyTorch's deterministic mode (tiles change the order of additions, so a
    table would change bits between GPUs) and without an entry in the table: that which the ranks of a run have agreed
    on (`adopt_table`), else this GPU's.
    """
    entry = _name_entry(kernel, shape)
    # A tuning in progress decides, and learns here which kernels an operation launches.
    if _SESSIONS:
        _SESSIONS[-1].asked.setdefault(entry, tuple(candidates))
        return _SESSIONS[-1].forced.get(entry, candidates[0])
    if INTERPRETED or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    table = _ADOPTED[-1] if _ADOPTED else load_table(device)
    return table.configs.get(entry, candidates[0])


def choose_table(tables: Sequence[Table]) -> Table | None:
    """The table that all ranks of a run take, from their own by rank: rank 0's; None if their GPUs or compilers
    differ.

    Ranks that launched other tiles than their neighbours would round otherwise, and a tile that one GPU has room for
    another may not have.
    """
    first = tables[0]
    return first if all(table.environment == first.environment for table in tables) else None


def adopted_table() -> Table | None:
    """What the ranks of this run have agreed on; None before, and where nothing runs in Triton on a GPU."""
    return _ADOPTED[-1] if _ADOPTED else None


def adopt_table(table: Table) -> None:
    """From now on this process takes its tiles from `table`, whatever the files of this machine say."""
    _ADOPTED[:] = [table]
    for forget in _FORGET:
        forget()


def products_by_torch(table: Table) -> list[str]:
    """Entries by which PyTorch makes products in place of our kernels."""
    return sorted(entry for entry, config in table.configs.items() if config.get("TORCH"))


def tune(
    run: Callable[[], Sequence[Tensor]],
    expected: Sequence[Tensor],
    measure: Callable[[Callable[[], object]], float],
    table: Table,
    *,
    tolerance: float,
    report: Callable[[str], None],
) -> None:
    """Time the candidates of every kernel that `run` launches and put the fastest right one into `table`.

    run: gives outputs and gradients; expected: the same of another implementation, in float32 at least. A candidate is
    timed only if it repeats bit by bit and its largest relative RMS error is within `tolerance`, or within 1.5 times
    that of the first candidate where that is less. One that fails or does not compile is reported and left out.
    Raises RuntimeError if the first candidate itself is wrong: this compiler miscompiles the kernel.
    """
    with _session() as session:
        run()
        for entry, candidates in sorted(session.asked.items(), key=lambda asked: _is_choice(asked[0])):
            if entry in table.configs or len(candidates) == 1:
                continue
            tuned = {name: config for name, config in table.configs.items() if not _is_choice(name)}
            session.forced = {**tuned} if _is_choice(entry) else {}
            best, least, limit = candidates[0], float("inf"), tolerance
            for candidate in candidates:
                session.forced[entry] = candidate
                error, fault = _try(run, expected, limit)
                if fault and candidate is candidates[0]:
                    raise RuntimeError(f"{entry}: the kernel's own configuration {dict(candidate)} {fault}")
                if fault:
                    report(f"{entry}: {dict(candidate)} {fault}; left out")
                    continue
                # A candidate that passed tightens the limit for those after it.
                limit = min(limit, max(_WORSE * error, 1e-6))
                milliseconds = measure(run)
                if milliseconds < least:
                    best, least = candidate, milliseconds
            session.forced.clear()
            table.configs[entry] = dict(best)
            report(f"{entry}: {dict(best)}, {least:.3g} ms")


def find_environment(device: torch.device) -> Environment:
    """GPU, Triton and ptxas release of a CUDA device."""
    version, (major, minor) = triton_version(), torch.cuda.get_device_capability(device)
    assert version is not None, "kernels are tuned without Triton"
    release = find_assembler_release(major * 10 + minor)
    return Environment(torch.cuda.get_device_name(device), ".".join(map(str, version)), release)


def find_assembler_release(architecture: int, find: Callable[..., Any] = get_ptxas) -> str:
    """Release of the ptxas that Triton assembles with for an architecture; Triton 3.5 has one for all, and is asked without it."""
    assembler = find(architecture) if inspect.signature(find).parameters else find()
    text = subprocess.run([assembler.path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    assert found is not None, f"ptxas printed no version: {text!r}"
    return found.group(1)


def load_table(device: torch.device) -> Table:
    """The table of a CUDA device, read once a process; its environment asks the GPU and the assembler."""
    return _load_table(device.index or 0)


@functools.cache
def _load_table(index: int) -> Table:
    return Table.load(find_environment(torch.device("cuda", index)))


def _is_choice(entry: str) -> bool:
    """Whether an entry chooses between kernels instead of a kernel's tile."""
    return entry.partition(" ")[0].endswith(f"_{CHOICE}")


def kept_until_retuned(find: Callable[..., Config]) -> Callable[..., Config]:
    """Decorates what ends in `config_for` and is asked at every launch: its answers are kept by its (hashable) arguments.

    They are forgotten where a table is adopted; while something is tuned nothing is kept.
    """

    @functools.cache
    def keep(deterministic: bool, *arguments: object) -> Config:
        return find(*arguments)

    @functools.wraps(find)
    def answer(*arguments: object) -> Config:
        if _SESSIONS:
            return find(*arguments)
        return keep(torch.are_deterministic_algorithms_enabled(), *arguments)

    _FORGET.append(keep.cache_clear)
    return answer


def _name_entry(kernel: str, shape: Sequence[object]) -> str:
    """Key of a kernel and the shape it was compiled for."""
    return " ".join([kernel, *map(str, shape)])


@contextlib.contextmanager
def _session() -> Iterator[_Session]:
    """Inside, `config_for` answers from this session and notes what was asked."""
    _SESSIONS.append(_Session())
    try:
        yield _SESSIONS[-1]
    finally:
        _SESSIONS.pop()


def _try(run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor], limit: float) -> tuple[float, str]:
    """Largest relative error of a candidate, and what is wrong with it ("" if nothing is)."""
    try:
        once, again = run(), run()
    except (OutOfResources, PTXASError, CompilationError) as reason:
        return float("inf"), f"does not run here ({reason})"
    error = max(_relative_error(value, exact) for value, exact in zip(once, expected, strict=True))
    if not error <= limit:
        return error, f"is wrong by {error:.2g} (relative), more than {limit:.2g}"
    if not all(torch.equal(one, other) for one, other in zip(once, again, strict=True)):
        return error, "returns other values the second time"
    return error, ""


def _relative_error(value: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of the exact values; NaN for values that are not finite."""
    difference = (value.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(1e-30))


_OPTIONS = ("num_warps", "num_stages")


def describe_launch_failure(error: BaseException) -> str | None:
    """Kernel, tile, cause and fix of an error that Triton raised; None for any other error.

    Out of shared memory or registers, a compiler that rejects the kernel, an assembler that fails.
    """
    if not isinstance(error, TritonError):
        return None
    kernel, tile = _launch_of(error)
    shown = ", ".join(f"{name}={value}" for name, value in tile.items()) or "its only one"
    cause = " ".join(str(error).split())[:500]
    if isinstance(error, OutOfResources):
        return (
            f"{kernel} with the tile {shown} does not fit this GPU ({cause}): choose its tile by `amfm bench kernels "
            "--tune`, or run with kernels.backend=torch"
        )
    return (
        f"{kernel} with the tile {shown} does not compile under this Triton ({type(error).__name__}: {cause}): install "
        "the Triton that docs/gpu.md names for your torch, or run with kernels.backend=torch"
    )


def _launch_of(error: BaseException) -> tuple[str, dict[str, Any]]:
    """Name of the kernel that was being launched, and the numbers it was to be compiled for."""
    trace = error.__traceback__
    while trace is not None:
        names = trace.tb_frame.f_locals
        kernel = names.get("self")
        if isinstance(kernel, JITFunction) and trace.tb_frame.f_code.co_name == "run":
            given = names.get("kwargs", {})
            tile = {name: value for name, value in given.items() if name.startswith("BLOCK_") or name in _OPTIONS}
            return f"the kernel {kernel.__name__}", tile
        trace = trace.tb_next
    return "a kernel", {}
