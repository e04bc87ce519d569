"""What pytest-xdist starts as a worker's interpreter: asks for a fork that has collected the tests, and lives as long as it.

Called as `python -m tests.helpers.processes.forked_worker -u -c CODE`. The fork has this process's standard streams, through
which xdist speaks with its workers.
"""

from __future__ import annotations

import signal
import sys

from tests.helpers.processes.zygote import fork_worker


def main() -> None:
    """Wait for the fork, which ends when this process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the process that started this one
    words = [word for word in sys.argv[1:] if word != "-u"]  # xdist's streams have no buffers
    sys.exit(fork_worker(words).wait())


if __name__ == "__main__":
    main()
