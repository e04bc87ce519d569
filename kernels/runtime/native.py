"""C code of our own on a CPU: compiled once per machine by its compiler, kept in the user's cache, loaded by ctypes.

Why no wheel carries it: it is compiled for the processor that is there, with all of its vectors, in two seconds. Its file is named
by a digest of source, flags, compiler and processor, so that machines that share a home directory each have theirs, and is
published by rename, so that whoever finds one finds it whole. Code is loaded into the process: only from a folder and a
file that are this user's and that no one else can write.

Threads are those of the OpenMP that PyTorch runs on, found among what is loaded: a second one would have its own threads,
which spin next to PyTorch's. Where there is none, the code runs on one thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amfm.kernels.runtime.compiling import assume_constant
from amfm.kernels.runtime.user_cache import scratch_folder, user_folder

_LOG = logging.getLogger(__name__)
# Not -ffast-math: linked into a library, it makes the whole process flush small numbers to zero. NaN and infinity stay.
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
    *("-fassociative-math", "-fPIC", "-shared"),
)
_KERNELS = Path(__file__).parents[1]
MAMBA2 = _KERNELS / "mamba2" / "native.c"
MAMBA2_STEP = _KERNELS / "mamba2" / "native_step.c"
EXPERT_ROWS = _KERNELS / "moe" / "native_rows.c"
ROUTE_ROWS = _KERNELS / "moe" / "native_route.c"
NORM_ROWS = _KERNELS / "norm" / "native_rows.c"
SOURCES = (MAMBA2, MAMBA2_STEP, EXPERT_ROWS, ROUTE_ROWS, NORM_ROWS)
COMPILER_VARIABLE = "CC"
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 300
# Run in a process of its own: code that this processor cannot run ends it.
_TRY = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).mix_check())"


class NoNativeCode(RuntimeError):
    """Native code cannot be compiled or loaded here; the message says why."""


_WITHDRAWN: list[str] = []  # why this process does not run native code though it could


def withdraw_native(reason: str) -> None:
    """Let this process compute without native code from now on, as another rank must."""
    _WITHDRAWN.append(reason)


@assume_constant
def refuse_native(device: torch.device) -> str | None:
    """Why native code cannot run on `device`, None if it can: it is then compiled and loaded."""
    if _WITHDRAWN:
        return _WITHDRAWN[-1]
    if device.type not in ("cpu", "meta"):
        return f"native code runs on a CPU; the tensors are on {device.type}"
    return _try_native()


@functools.cache
def _try_native() -> str | None:
    """Why native code cannot be had on this machine; compiled and loaded by the first call of a process."""
    try:
        for source in SOURCES:
            load_library(source)
    except NoNativeCode as reason:
        return str(reason)
    return None


def choose_on_cpu(dtype: torch.dtype, unfit: str | None) -> tuple[str, str]:
    """The backend of a run on a CPU, "native" or "torch", with the reason; unfit: why no block of the model runs native code."""
    if unfit is None and dtype not in (torch.float32, torch.bfloat16):
        unfit = f"native code takes float32 and bf16, and the run computes in {str(dtype).removeprefix('torch.')}"
    reason = refuse_native(torch.device("cpu")) if unfit is None else unfit
    return ("native", "the device is a CPU, and its C code runs here") if reason is None else ("torch", reason)


def check_native(device: torch.device) -> None:
    """Raise ValueError where native code cannot run on `device`."""
    refusal = refuse_native(device)
    if refusal is not None:
        raise ValueError(f'kernels backend "native" cannot run: {refusal}; use "auto" or "torch"')


def find_compiler() -> list[str] | None:
    """The command of the C compiler: `$CC`, else cc, gcc or clang; None if there is none."""
    named = shlex.split(os.environ.get(COMPILER_VARIABLE, ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    return None


@functools.cache
def find_openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP that PyTorch has loaded; None if there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@functools.cache
def load_library(source: Path) -> Any:
    """The library of a C file, compiled where the user's cache has none for this compiler and processor.

    Raises NoNativeCode, a RuntimeError, with the reason: no compiler, one that fails, or no folder of our own.
    """
    if not sys.platform.startswith("linux"):
        raise NoNativeCode(f"native code is compiled on Linux, and this is {sys.platform}")
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get(COMPILER_VARIABLE) or ", ".join(_COMPILERS)
        raise NoNativeCode(f"there is no C compiler ({wanted})")
    path = _own_folder() / f"{source.stem}-{source.parent.name}-{_digest(source, compiler)}.so"
    if not path.exists():
        _compile_once(source, compiler, path)
    if not _is_ours(path):
        raise NoNativeCode(f"{path} is not a file of this user that only this user can write; delete it")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoNativeCode(f"{path} cannot be loaded: {error}") from error


def call_native(
    source: Path,
    function: str,
    integers: Mapping[str, int],
    doubles: Mapping[str, float],
    tensors: Mapping[str, Tensor | None],
    *,
    parallel: int | None = None,
) -> None:
    """Call a function of a C file with one structure: these integers and doubles, `parallel`, then addresses of tensors, in order.

    Raises RuntimeError if the structure has another size than the file's.
    """
    kind = _structure((*integers,), (*doubles,), (*tensors,))
    library = load_library(source)
    if library.given_size() != ctypes.sizeof(kind):
        raise RuntimeError(
            f"{source} takes {library.given_size()} bytes; got {ctypes.sizeof(kind)}: {[*integers, *tensors]}"
        )
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors.values())
    given = kind(*integers.values(), *doubles.values(), parallel, *addresses)
    called = getattr(library, function)
    for note in _NOTES:
        note(NativeCall(called, given, [*tensors.values()]))
    called(ctypes.byref(given))


class NativeCall(NamedTuple):
    """A call of C code that is about to run: the function, the structure that it is given, and the tensors that it points to."""

    function: Any
    given: ctypes.Structure
    tensors: list[Tensor | None]


_NOTES: list[Callable[[NativeCall], None]] = []


@contextmanager
def note_native_calls(note: Callable[[NativeCall], None]) -> Iterator[None]:
    """Inside, `note` gets each call of C code before it runs; of any thread."""
    _NOTES.append(note)
    try:
        yield
    finally:
        _NOTES.remove(note)


@functools.cache
def _structure(integers: tuple[str, ...], doubles: tuple[str, ...], tensors: tuple[str, ...]) -> type[ctypes.Structure]:
    """What C code is given, by the names of its parts."""
    kinds: dict[Any, tuple[str, ...]]
    kinds = {ctypes.c_long: integers, ctypes.c_double: doubles, ctypes.c_void_p: ("parallel", *tensors)}

    class Given(ctypes.Structure):
        _fields_ = [(name, kind) for kind, names in kinds.items() for name in names]

    return Given


def _own_folder() -> Path:
    """The first folder of compiled code, in the user's cache or `$TMPDIR`, that is ours. Raises NoNativeCode if none is."""
    reasons = []
    for folder in (user_folder("native"), scratch_folder("native")):
        if folder is None:
            continue
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
            continue
        if _is_ours(folder, is_folder=True):
            return folder
        reasons.append(f"{folder} is not a folder of this user that only this user can write")
    raise NoNativeCode("compiled code has no place: " + ("; ".join(reasons) or "there is no home directory"))


def _is_ours(path: Path, *, is_folder: bool = False) -> bool:
    """Whether a path is a file, or a folder, of this user that no one else can write; not a link."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    is_kind = stat.S_ISDIR(facts.st_mode) if is_folder else stat.S_ISREG(facts.st_mode)
    return is_kind and facts.st_uid == os.getuid() and not facts.st_mode & 0o022


def _digest(source: Path, compiler: list[str]) -> str:
    """Names what is compiled, how, by which compiler, and for which processor."""
    facts = os.stat(compiler[0])
    built = [*compiler, *FLAGS, os.path.realpath(compiler[0]), str(facts.st_size), str(facts.st_mtime_ns)]
    digest = hashlib.sha256(source.read_bytes())
    digest.update("\n".join([*built, *describe_processor()]).encode())
    return digest.hexdigest()[:24]


def describe_processor() -> list[str]:
    """The lines of /proc/cpuinfo that say what code the first processor runs."""
    kinds = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part", "isa")
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        first = ""
    return [os.uname().machine, *(line for line in first.splitlines() if line.partition(":")[0].strip() in kinds)]


def _compile_once(source: Path, compiler: list[str], path: Path) -> None:
    """Compile into `path` while other processes of this machine wait; nothing if one of them has done it."""
    with ExitStack() as opened:
        try:
            lock = opened.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            _LOG.info("%s cannot be locked (%s)", path, error.strerror or error)
        if not path.exists():
            _compile(source, compiler, path)


def _compile(source: Path, compiler: list[str], path: Path) -> None:
    """Compile a file and try it in another process, then publish it whole. Raises NoNativeCode if either fails."""
    began = time.monotonic()
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        _run([*compiler, *FLAGS, str(source), "-o", str(partial), "-lm"], f"{compiler[0]} cannot compile {source.name}")
        partial.chmod(0o700)
        _run([sys.executable, "-I", "-c", _TRY, str(partial)], f"what {compiler[0]} made of {source.name} does not run")
        partial.replace(path)
    except OSError as error:
        raise NoNativeCode(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    _LOG.info("%s compiled in %.1f s, once: %s", source.name, time.monotonic() - began, path)


def _run(command: list[str], fault: str) -> None:
    """Run a command. Raises NoNativeCode with the first line that names an error if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NoNativeCode(f"{fault}: no end within {_SECONDS} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it said nothing")
        raise NoNativeCode(f"{fault}: {said} (exit code {done.returncode})")
