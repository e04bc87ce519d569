"""Checks an operation's kernels once on each card, before anything is computed with them.

Why: a compiler may make wrong numbers of a right kernel, on one card and not on another, and a training run shows that as a
loss that is a little too high. So the first use of an operation on a card holds it against float64 at a small shape with the
tiles of production, in a process of its own: a kernel that crashes must not take the run's context with it, and one that never
ends is stopped. What was found is kept in the user's cache under the card, torch, Triton and a digest of all our kernels'
source; processes of a machine that start at once wait for the first one's answer.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from amfm.kernels.runtime.user_cache import user_folder, write_whole

_LOG = logging.getLogger(__name__)
_FOLDER = Path(__file__).parents[1]  # of all kernels
# Compiling the slowest operation's kernels takes a minute.
_SECONDS = 900
DEFAULT_CASES = "amfm.kernels.proof.operations"
# Set to 1 in processes that check kernels: they ask for no check themselves.
CHECKING_VARIABLE = "AMFM_CHECKING"


def can_be_checked() -> bool:
    """Whether there is a card to ask: not in simulations, whose tensors are fake, nor in a process that checks already.

    The tensors that torch.compile traces with are no reason: they are not in place while this is asked.
    """
    fake = any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
    checking = os.environ.get(CHECKING_VARIABLE) == "1"
    return torch.version.cuda is not None and not fake and not checking and torch.cuda.device_count() > 0


def find_faults(operation: str, device: torch.device) -> list[str]:
    """What is wrong with an operation's kernels on a card, looked up or checked now; empty where they are right.

    Raises RuntimeError where the check itself cannot run.
    """
    versions = f"torch {torch.__version__} triton {importlib.metadata.version('triton')}"
    card = f"{torch.cuda.get_device_name(device)} {versions} {os.environ.get('TRITON_PTXAS_PATH', '')}"
    return look_up(operation, str(device), card.strip(), user_folder("checked"))


def look_up(operation: str, device: str, card: str, folder: Path | None, cases: str = DEFAULT_CASES) -> list[str]:
    """The faults that `folder` knows of an operation on a card, after a check where it knows nothing yet.

    card: names the card and its compilers. folder: None checks each time. A check of another process is waited for.
    """
    if folder is None:
        return check_now(operation, device, cases)
    path = folder / (re.sub(r"[^A-Za-z0-9.]+", "-", f"{card} {digest_source()}").strip("-") + f"_{operation}.json")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.is_file():
                write_whole(path, {"operation": operation, "card": card, "faults": check_now(operation, device, cases)})
    faults: list[str] = json.loads(path.read_text())["faults"]
    return faults


def check_now(operation: str, device: str, cases: str = DEFAULT_CASES) -> list[str]:
    """Hold an operation's first trials against float64 in a child. Raises RuntimeError where that cannot start."""
    _LOG.info("first use of %s on this card: its kernels are compiled and held against float64, once", operation)
    interpreted = device == "cpu"
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0", CHECKING_VARIABLE: "1"}
    settings = {"do": "check", "operation": operation, "kinds": ["first"], "device": device, "cases": cases}
    command = [sys.executable, "-P", "-m", "amfm.kernels.acceptance.child", json.dumps(settings)]
    try:
        child = subprocess.run(
            command,
            cwd=_FOLDER.parents[1],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [f"did not end within {_SECONDS} s"]
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    faults = [f"{line['trial']}: {fault}" for line in lines if "trial" in line for fault in line["faults"]]
    if child.returncode:
        said = (child.stderr.strip() or "it said nothing").splitlines()[-1]
        if not lines:
            raise RuntimeError(f"the kernels of {operation} could not be checked on this card: {said}")
        begun = lines[-1].get("begun", "")
        faults.append(f"{begun}: the check ended with code {child.returncode}: {said}")
    return faults


@functools.cache
def digest_source() -> str:
    """Digest of all our kernels' source: an edited kernel is another one."""
    digest = hashlib.sha256()
    for path in sorted(_FOLDER.rglob("*.py")):
        digest.update(str(path.relative_to(_FOLDER)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside, no other process of this machine holds the lock."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
