"""What srun says while it runs an attempt: of its ranks, and of itself."""

from __future__ import annotations

import re
import signal
import sys
from typing import IO

from amfm.launch.cluster.node_logs import find_message

SIGNALLED = signal.strsignal(signal.SIGUSR1) or "User defined signal 1"
NO_STEP = "Unable to create step"
FAILED_TASK = re.compile(r"srun: error: .*\btasks? (\d+)")


class SrunOutput:
    """What srun itself says, copied to standard error: amfm's first message in it, its first error, and the task it names."""

    def __init__(self) -> None:
        self.message = self.error = ""
        self.failed_task: int | None = None

    def follow(self, stream: IO[bytes]) -> None:
        """Copy lines until srun closes its output."""
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n")
            self.message = self.message or find_message(line)
            if line.startswith("srun: error"):
                self.error = self.error or line
                found = FAILED_TASK.match(line)
                if found and self.failed_task is None:
                    self.failed_task = int(found[1])
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
