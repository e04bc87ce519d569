"""The head of a Ray cluster: without it Ray ends every program of the cluster after a minute, by exit codes of its own.

So the launcher looks whether the head answers, and ends before that, with a code and words that say what to do.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import ray

from amfm.launch.console import say
from amfm.pretrain.launcher_protocol import RUN_FAILED

LOOK_SECONDS = 2.0
LOST_SECONDS = 30.0  # of the 60 after which Ray ends this program


class RayHead:
    """Whether the head of the cluster that this program is connected to answers."""

    def __init__(self) -> None:
        self.address = str(ray.get_runtime_context().gcs_address)
        self.looked = self.heard = time.monotonic()

    def answers(self) -> bool:
        """Whether it answers now."""
        host, _, port = self.address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_SECONDS):
                return True
        except OSError:
            return False

    def look(self) -> None:
        """Look now and then; ends this program where the head has not answered for LOST_SECONDS.

        At once, since Ray's own clean-up would wait for the head, and end the program by another code.
        """
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        if self.answers():
            self.heard = time.monotonic()
        elif now - self.heard > LOST_SECONDS:
            say(
                f"amfm launch: the head of the Ray cluster at {self.address} does not answer; start it, and give the same command"
            )
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(RUN_FAILED)
