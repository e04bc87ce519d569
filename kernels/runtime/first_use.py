"""Checks an operation's kernels once on each GPU, before anything is computed with them.

Why: a compiler may make wrong numbers of a right kernel, on one GPU and not on another, and a training run shows that
as a loss that is a little too high. So the first use of an operation on a GPU compares it with float64 at a small shape
with the tiles of production, in a separate process: a kernel that crashes must not take the run's context with it, and
one that never ends is stopped. What was found is kept in the user's cache under the GPU, torch, Triton and a digest of
all our kernels' source and of that in a package's folder; processes of a machine that start immediately wait for the first one's answer. A folder that cannot
be written, or a GPU that no second process may use, costs a repeated check and no run.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from amfm.kernels.runtime.user_cache import can_write, scratch_folder, user_folder, write_whole

_LOG = logging.getLogger(__name__)
_FOLDER = Path(__file__).parents[1]  # of all kernels
# Compiling the slowest operation's kernels takes a minute.
_SECONDS = 900
DEFAULT_CASES = "amfm.kernels.proof.operations"
_CHECKER = "amfm.kernels.acceptance.child"
# What CUDA says to a second process on a GPU in exclusive-process mode (cudaErrorDevicesUnavailable).
_OCCUPIED = ("busy or unavailable", "CUDA_ERROR_DEVICE_UNAVAILABLE")
# Set to 1 in processes that check kernels: they ask for no check themselves.
CHECKING_VARIABLE = "AMFM_CHECKING"


def can_be_checked() -> bool:
    """Whether there is a GPU to ask: not in simulations, whose tensors are fake, nor in a process that checks already.

    The tensors that torch.compile traces with are not a reason: they are not in place while this is asked.
    """
    fake = any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
    checking = os.environ.get(CHECKING_VARIABLE) == "1"
    return torch.version.cuda is not None and not fake and not checking and torch.cuda.device_count() > 0


def find_faults(operation: str, device: torch.device, cases: str) -> list[str]:
    """What is wrong with an operation's kernels on a GPU, looked up or checked now; empty where they are right.

    Raises CannotCheck if the check itself cannot run.
    """
    versions = f"torch {torch.__version__} triton {importlib.metadata.version('triton')}"
    gpu = f"{torch.cuda.get_device_name(device)} {versions} {os.environ.get('TRITON_PTXAS_PATH', '')}"
    folders = (find("checked") for find in (user_folder, scratch_folder))
    return read_or_check(operation, str(device), gpu.strip(), folders, cases)


def read_or_check(
    operation: str, device: str, gpu: str, folders: Iterable[Path | None], cases: str = DEFAULT_CASES
) -> list[str]:
    """The faults that one of the folders knows of an operation on a GPU, after a check if none knows anything yet.

    `gpu`: names the GPU and its compilers. folders: those that are None are passed over; the first that can be written keeps
    what is found, and where none can, it is not kept. A check of another process is waited for.
    """
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu} {digest_source(cases)}").strip("-") + f"_{operation}.json"
    refused = []
    for folder in folders:
        if folder is None:
            continue
        known = _read(folder / name)
        if known is not None:
            return known
        if can_write(folder):
            return _check_once(folder / name, operation, device, gpu, cases)
        refused.append(f"{folder} cannot be written")
    _warn_not_kept(", ".join(refused) or "there is no home directory")
    return check_now(operation, device, cases)


def _check_once(path: Path, operation: str, device: str, gpu: str, cases: str) -> list[str]:
    """The faults that a file keeps, after a check where another process has not written it meanwhile."""
    with _locked(path.with_suffix(".lock")):
        known = _read(path)
        if known is None:
            known = check_now(operation, device, cases)
            try:
                write_whole(path, {"operation": operation, "card": gpu, "faults": known})
            except OSError as error:
                _warn_not_kept(f"{path.parent}: {error.strerror or error}")
    return known


def _read(path: Path) -> list[str] | None:
    """The faults that a file keeps; None if there is none, or one that was not written to its end."""
    try:
        faults: list[str] = json.loads(path.read_text())["faults"]
    except (OSError, ValueError, KeyError):
        return None
    return faults


@functools.cache
def _warn_not_kept(where: str) -> None:
    """Report once that every start will check again."""
    _LOG.warning("checks of kernels are not kept (%s), so each start repeats them; set XDG_CACHE_HOME", where)


class CannotCheck(RuntimeError):
    """The check of an operation could not run, so nothing is known of its kernels."""


def check_now(operation: str, device: str, cases: str = DEFAULT_CASES) -> list[str]:
    """Compare an operation's first trials with float64 in a child; where a GPU is for only one process, in this one.

    Raises CannotCheck if that cannot start.
    """
    _LOG.info("first use of %s on this GPU: its kernels are compiled and compared with float64, once", operation)
    environment = os.environ | {"TRITON_INTERPRET": "1" if device == "cpu" else "0", CHECKING_VARIABLE: "1"}
    settings = {"do": "check", "operation": operation, "kinds": ["first"], "device": device, "cases": cases}
    try:
        child = subprocess.run(
            child_command(settings), cwd=_FOLDER.parents[1], env=environment, capture_output=True, text=True,
            timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [f"did not end within {_SECONDS} s"]
    except OSError as error:
        raise CannotCheck(f"the kernels of {operation} could not be checked on this GPU: {error}") from error
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    if child.returncode and not lines:
        if any(words in child.stderr for words in _OCCUPIED):
            _LOG.info("this GPU allows only one process (compute mode): %s is checked in this process", operation)
            return _faults_in(_check_here(settings))
        raise CannotCheck(f"the kernels of {operation} could not be checked on this GPU: {_cause(child.stderr)}")
    faults = _faults_in(lines)
    if child.returncode:
        begun = lines[-1].get("begun", "")
        faults.append(f"{begun}: the check ended with code {child.returncode}: {_cause(child.stderr)}")
    return faults


def _faults_in(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The faults that a check has written."""
    return [f"{line['trial']}: {fault}" for line in lines if "trial" in line for fault in line["faults"]]


def _cause(errors: str) -> str:
    """The line of an exception in what a child wrote to standard error, else the last one: CUDA's end in advice."""
    lines = (errors.strip() or "it said nothing").splitlines()
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Exit): ", line)), lines[-1])


def _check_here(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What the child would answer, from a thread of this process: none of the caller's modes of autograd holds there.

    The generators are as before.
    """
    lines: list[dict[str, Any]] = []
    raised: list[Exception] = []

    def check() -> None:
        try:
            importlib.import_module(_CHECKER).serve(settings, lines.append)
        except Exception as error:  # noqa: BLE001 - raised again where the thread is joined
            raised.append(error)

    os.environ[CHECKING_VARIABLE] = "1"
    try:
        with torch.random.fork_rng(devices=[] if settings["device"] == "cpu" else [torch.device(settings["device"])]):
            thread = threading.Thread(target=check, name="first use")
            thread.start()
            thread.join()
    finally:
        del os.environ[CHECKING_VARIABLE]
    for error in raised:
        words = f"the kernels of {settings['operation']} could not be checked on this GPU: {error}"
        raise CannotCheck(words) from error
    return lines


def child_command(settings: dict[str, Any]) -> list[str]:
    """The command of a child, which finds the package of the cases where this process has it, after all other places."""
    package = importlib.import_module(settings.get("cases", DEFAULT_CASES).partition(".")[0])
    asked = settings | {"folders": [*getattr(package, "__path__", ())]}
    return [sys.executable, "-P", "-m", _CHECKER, json.dumps(asked)]


@functools.cache
def digest_source(cases: str = DEFAULT_CASES) -> str:
    """Digest of the source of all our kernels and of the folder of the cases: an edited kernel is another one."""
    digest = hashlib.sha256()
    module = importlib.util.find_spec(cases)
    for folder in (_FOLDER, *([Path(module.origin).parent] if module is not None and module.origin else ())):
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside, no other process of this machine holds the lock; on file systems without locks, two may check at once."""
    with ExitStack() as opened:
        try:
            fcntl.flock(opened.enter_context(path.open("w")), fcntl.LOCK_EX)
        except OSError as error:
            _LOG.info("%s cannot be locked (%s)", path, error.strerror or error)
        yield
