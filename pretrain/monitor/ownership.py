"""One owner of a run directory, also among hosts whose file system does not share locks between them.

The lock of the run directory (`lock_directory`) is the kernel's: some network file systems keep it on one host. Then
two launchers could train in one directory, or ranks that were cut off from the network could come back and continue
next to those that replaced them. Two rules prevent it, and need nothing but a shared directory:

- Who starts looks at the heartbeats of other hosts. Where one still changes, that run lives, and the start is rejected.
- Who starts writes its own number into `run.dir/owner.json`. Who finds another number there has been replaced: its
  watchdog ends it, and it commits no checkpoint any more.

Beats are compared with themselves and never with a clock, because clocks of hosts differ.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from amfm.data_pipeline.durable.files import named, take_lock, write_file_atomically
from amfm.data_pipeline.durable.json_files import parse_line
from amfm.pretrain.monitor.beats import read_beats
from amfm.pretrain.monitor.heartbeat import WRITE_SECONDS

OWNER_NAME = "owner.json"
LOCK_NAME = "lock"
MAX_OWNER_BYTES = 4096
WATCH_SECONDS = 3 * WRITE_SECONDS


@dataclass(frozen=True)
class Ownership:
    """This start's right to write to a run directory; only the main rank has one."""

    path: Path
    token: str

    @classmethod
    def take(cls, run_dir: Path) -> Ownership:
        """Replace the owner before, whose ranks must be silent (`require_silence`)."""
        owner = cls(run_dir / OWNER_NAME, secrets.token_hex(16))
        facts = {"token": owner.token, "host": socket.gethostname(), "process": os.getpid()}
        write_file_atomically(owner.path, json.dumps(facts).encode() + b"\n")
        return owner

    def check(self) -> None:
        """Raise RuntimeError when another start has become the owner; OSError when that cannot be read.

        A file that someone removed names no one else.
        """
        found = read_owner(self.path.parent)
        if found is not None and found.get("token") != self.token:
            raise RuntimeError(
                f"another start of this run became the owner of {self.path.parent} (process {found.get('process')} on "
                f"{found.get('host')}); this one ends and writes nothing more"
            )


def read_owner(run_dir: Path) -> dict[str, Any] | None:
    """Facts of the start that owns a run directory, empty where they are damaged; None if none does.

    Raises OSError.
    """
    path = run_dir / OWNER_NAME
    try:
        with named(path), path.open("rb") as file:
            return parse_line(file.read(MAX_OWNER_BYTES)) or {}
    except FileNotFoundError:
        return None


def lock_directory(directory: Path) -> IO[bytes]:
    """Create the run directory and lock it: two runs that write to one directory destroy each other's checkpoints.

    The lock ends with the process, however it ends. Raises RuntimeError when another process holds it, or ranks of
    another host, which may not see the lock, train here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = take_lock(directory / LOCK_NAME, wait=False)
    if lock is None:
        raise RuntimeError(describe_taken(directory))
    require_silence(directory)
    return lock


def describe_taken(directory: Path) -> str:
    """Message for a start in a run directory whose lock another process holds."""
    return f"another process trains in {directory}; wait for it, end it, or give this run another run.dir"


def require_silence(run_dir: Path) -> None:
    """Wait until the beats of other hosts are known to be leftovers. Raises RuntimeError naming a rank that beats.

    Takes no time if no other host left a beat: ranks that end in order remove theirs.
    """
    host = socket.gethostname()
    first = {beat.rank: beat for beat in read_beats(run_dir / "heartbeats") if beat.host != host}
    deadline = time.monotonic() + WATCH_SECONDS
    while first and time.monotonic() < deadline:
        time.sleep(WRITE_SECONDS / 4)
        for beat in read_beats(run_dir / "heartbeats"):
            known = first.get(beat.rank)
            if known is not None and known.host == beat.host and known.seen != beat.seen:
                raise RuntimeError(
                    f"rank {beat.rank} on {beat.host} trains in {run_dir}, at step {beat.step}; end that run, or give this "
                    "one another run.dir"
                )
