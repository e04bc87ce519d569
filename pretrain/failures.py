"""What an error means, judged in one place: exit code and words, by the phase that it came up in.

While a command starts, what its user can correct (a setting, a path, credentials) ends with 2, and everything else of the
machine with 3. Once a run is under way nothing is the settings' fault any more: whatever the machine rejects ends with 3, so that a
supervisor starts again from the newest checkpoint. A bug (AssertionError, TypeError, ...) is neither and keeps its
traceback. Messages of the system carry the path they are about (`amfm.data_pipeline.durable.files.named`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from amfm.data_pipeline.store.object_store import NoCredentialsError
from amfm.pretrain.launcher_protocol import BAD_INPUT, RUN_FAILED

# What a path in the settings can be wrong about; the rest of the system's errors are the machine's state.
CORRECTABLE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EINVAL),
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}

LESS_MEMORY = "lower train.micro_batch_size, or see docs/debugging.md#out-of-memory"

# What the system's loader says of a library for which it has no room.
NO_MEMORY = ("failed to map segment", "cannot allocate memory")

# What Python and native libraries say where the system rejects a thread or a process.
NO_THREADS = ("can't start new thread", "Resource temporarily unavailable")


class OwnCodeError(RuntimeError):
    """An error of own code ended a run. in_first_step: before any step of this start was done."""

    in_first_step = False


def exit_code(error: ValueError | RuntimeError | OSError | MemoryError) -> int:
    """2 for what the user can correct, 3 for the machine's state; for an error that ended a start, or a whole verb."""
    if isinstance(error, OSError):
        # Libraries raise some without a number, for files that are not there, and for those that do not answer.
        if isinstance(error, TimeoutError):
            return RUN_FAILED
        return BAD_INPUT if error.errno is None or error.errno in CORRECTABLE else RUN_FAILED
    return BAD_INPUT if isinstance(error, ValueError | NoCredentialsError) else RUN_FAILED


def is_bug(error: BaseException) -> bool:
    """Whether an error is a bug although Python derives it from RuntimeError."""
    return isinstance(error, RecursionError | NotImplementedError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or this host had too little memory; PyTorch has RuntimeErrors for both."""
    words = ("DefaultCPUAllocator", "out of memory", "alloc_cpu.cpp")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    )


def describe(error: Exception) -> str:
    """Describe an error by its message, with the notes on where it came up; one of the operating system with path and fix."""
    where = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, RuntimeError) and is_out_of_memory(error) and LESS_MEMORY not in str(error):
        cause = str(error).strip().splitlines()[0]
        return f"out of memory ({cause}){where}; {LESS_MEMORY}"
    return describe_alone(error) + where


def describe_alone(error: Exception) -> str:
    """Describe an error without its notes."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}; {choose_remedy(error.errno)}"
    if isinstance(error, MemoryError):
        cause = str(error) or "MemoryError"
        return f"this host's memory is used up ({cause}); give this more of it, or start fewer processes"
    if str(error) in NO_THREADS or (isinstance(error, BlockingIOError) and not error.filename):
        return (
            f"the system allows no further process or thread here ({error}); raise the limit of this user or job "
            "(`ulimit -u`, pids.max of its cgroup), or start fewer ranks and readers"
        )
    return str(error) or type(error).__name__


def choose_remedy(number: int | None) -> str:
    """Choose what helps against an error of the operating system, by its number."""
    if number in FULL:
        return "free space and continue"
    if number in CORRECTABLE:
        return "name another path, or make this one readable and writable"
    return "the storage failed; continue when it answers again"


@contextmanager
def while_running() -> Iterator[None]:
    """Inside the block a run is under way.

    Errors of the system, of memory and of values become RuntimeError, which ends with 3. A `sys.exit` too, whatever its
    code: a hook or a library that asks for it has not finished the run.
    """
    try:
        with launches_in_words():
            yield
    except SystemExit as error:
        raise RuntimeError(describe_exit(error)) from error
    except (OSError, ValueError, MemoryError, NoCredentialsError) as error:
        raise RuntimeError(describe(error)) from error


@contextmanager
def imports_in_words() -> Iterator[None]:
    """Inside, a library that cannot be loaded for want of memory (as below `ulimit -v`) raises MemoryError, not ImportError."""
    try:
        yield
    except ImportError as error:
        if any(words in str(error).lower() for words in NO_MEMORY):
            raise MemoryError(str(error)) from error
        raise


@contextmanager
def settings_worked(run_dir: str) -> Iterator[None]:
    """Inside the block a run starts; where it has a checkpoint, its paths were good once, and errors of the system end with 3."""
    try:
        yield
    except OSError as error:
        from amfm.pretrain.checkpoint.manifest_file import newest_saved_step

        if newest_saved_step(run_dir) < 0:
            raise
        raise RuntimeError(describe(error)) from error


def describe_exit(error: SystemExit) -> str:
    """Describe a `sys.exit` by the code that it had and the line that called it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return f"sys.exit({error.code!r:.80}) was called{where} while the run was under way; a plug-in must return, or raise what is wrong"


@contextmanager
def launches_in_words() -> Iterator[None]:
    """Inside, a Triton kernel that does not fit the GPU or does not compile raises RuntimeError that names it."""
    try:
        yield
    except Exception as error:
        # Triton's errors are not RuntimeErrors. It need not be installed, and then nothing of it is raised.
        if not any(base.__module__.partition(".")[0] == "triton" for base in type(error).__mro__):
            raise
        from amfm.kernels.runtime.tuning import describe_launch_failure

        words = describe_launch_failure(error)
        if words is None:
            raise
        raise RuntimeError(words) from error
