"""Ray's start on a machine that is busy: it waits for its processes as long as they live, and not for half a minute.

Ray gives its server of tables, its node and each worker a limit of 30 to 60 seconds. At a load of 15 all three are passed
by processes that only wait for a core. Two limits are variables of the environment; that of the node is a number in the
middle of a function (`ray._private.node`, 2.52 to 2.60), so what it asks in a loop waits in its place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

START_SECONDS = 900  # most of them for one process that lives: a core that serves thirty others gives it half a minute
LOOK_SECONDS = 0.5
NODE = "raylet"  # name of the node's process, which is our child
LIMITS = ("RAY_gcs_server_port_wait_time_s", "RAY_worker_register_timeout_seconds")


@contextmanager
def patient_start() -> Iterator[None]:
    """Inside the block a Ray that starts on this machine may take START_SECONDS for each of its processes.

    Where the environment sets limits they stay, and so does Ray's own where it has no function of that name. Not for one that
    joins a cluster: it would knock as long at an address where nothing is.
    """
    from ray._private import services

    unset = [name for name in LIMITS if name not in os.environ]
    original = getattr(services, "get_node", None)

    def get_node(*arguments: Any) -> Any:
        assert original is not None, "replaced only where there is one"
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return original(*arguments)
            except RuntimeError:  # the node has not reported yet
                if time.monotonic() > deadline or not is_node_alive():
                    raise
                time.sleep(LOOK_SECONDS)

    os.environ.update(dict.fromkeys(unset, str(START_SECONDS)))  # for the processes that Ray starts
    if original is not None:
        services.get_node = get_node
    try:
        yield
    finally:
        if original is not None:
            services.get_node = original
        for name in unset:
            del os.environ[name]


def is_node_alive() -> bool:
    """Whether a node of Ray that this process started runs."""
    import psutil  # comes with Ray

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == NODE and child.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
