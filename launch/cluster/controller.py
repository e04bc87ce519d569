"""Slurm's controller, asked and ordered: it may be away for minutes (an upgrade, a failover), which ranks outlive."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time

from amfm.launch.console import say

AWAY_SECONDS = 1800.0
PAUSE_SECONDS = 5.0
AWAY = re.compile(
    "contact slurm controller|Socket timed out|Zero Bytes were transmitted|Connection refused", re.IGNORECASE
)


def ask(*command: str) -> str:
    """Standard output of one of Slurm's programs; one that does not reach the controller is run again, for half an hour.

    Raises RuntimeError with its error text when it fails.
    """
    deadline, is_said = time.monotonic() + AWAY_SECONDS, False
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return done.stdout
        if not AWAY.search(done.stderr) or time.monotonic() > deadline:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
        if not is_said:
            say(
                f"amfm launch: Slurm's controller does not answer ({done.stderr.strip()}); asking every {PAUSE_SECONDS:.0f} s"
            )
        is_said = True
        time.sleep(PAUSE_SECONDS)


def describe(kind: str, name: str) -> dict[str, str]:
    """What the controller knows of a job or a node, by name of the field."""
    return dict(word.partition("=")[::2] for word in ask("scontrol", "-o", "show", kind, name).split())


def address_of(node: str) -> str:
    """Address at which Slurm reaches a node; on some clusters it is not the node's name."""
    return describe("node", node).get("NodeAddr", node)


def name_job() -> str:
    """This job's number; for one of an array with the array's, as one of them has the array's own number, which stands for all."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
