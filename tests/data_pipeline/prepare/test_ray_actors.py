"""The Ray that preparation starts for itself; what it writes stands in test_prepare.py and test_prepare_cluster.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# In a process of its own: a session's Ray would be used instead of one that is started.
DRIVER = """
import psutil, ray
from data_pipeline.prepare.ray_actors import PartWriter, running_ray
with running_ray(None, 1):
    writer = ray.remote(num_cpus=1)(PartWriter).remote(".", None)
    assert ray.get(writer.is_alive.remote())
    below = psutil.Process().children(recursive=True)
    print("nice", *(child.nice() for child in below if "PartWriter" in "".join(child.cmdline())))
"""


def priorities(environment: dict[str, str]) -> str:
    root = Path(__file__).parents[3]
    return subprocess.run(
        [sys.executable, "-c", DRIVER], env=environment, cwd=root, check=True, capture_output=True, text=True, timeout=120
    ).stdout.splitlines()[-1]  # fmt: skip


def test_actors_of_a_ray_of_our_own_run_at_the_priority_of_their_driver_unless_the_environment_says() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    own = os.nice(0)
    assert priorities(environment) == f"nice {own}"
    assert priorities(environment | {"RAY_worker_niceness": "7"}) == f"nice {min(own + 7, 19)}"
