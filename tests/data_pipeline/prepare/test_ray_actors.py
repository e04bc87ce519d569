"""Actors of Ray: what they write, killed or not, and the Ray that preparation starts for itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.ray_actors import NODE, is_node_alive, run_on_ray, start_ray
from amfm.data_pipeline.store.store import TokenStore
from tests.data_pipeline.prepare.stores import actor_pids, contents, elsewhere, is_descendant
from tests.helpers.patience import PATIENCE_SECONDS

# In a separate process: a session's Ray would be used instead of one that is started.
DRIVER = """
import os, signal, sys
import psutil, ray
from amfm.data_pipeline.prepare.ray_actors import PartWriter, running_ray
came = []
signal.signal(signal.SIGTERM, lambda *_: came.append(1))
with running_ray(None, 1):
    signal.raise_signal(signal.SIGTERM)
    assert came, "Ray has a handler of its own for SIGTERM"
    writer = ray.remote(num_cpus=1)(PartWriter).remote(".", None)
    assert ray.get(writer.is_alive.remote())
    below = psutil.Process().children(recursive=True)
    assert os.getcwd() not in ray.get(ray.remote(num_cpus=0)(lambda: sys.path).remote())
    print("nice", *(child.nice() for child in below if "PartWriter" in "".join(child.cmdline())))
"""


def priorities(environment: dict[str, str], folder: Path) -> str:
    environment |= {"PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    return subprocess.run(
        [sys.executable, "-P", "-c", DRIVER], env=environment, cwd=folder, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    ).stdout.splitlines()[-1]  # fmt: skip


@pytest.mark.slow
def test_actors_of_a_ray_of_our_own_have_the_priority_of_their_driver_and_import_nothing_of_the_working_directory(
    alone_with_ray: None, tmp_path: Path
) -> None:
    for name in ("amfm", "pydantic", "blake3", "zarr"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the working directory ran')")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    assert priorities(environment, tmp_path) == f"nice {os.nice(0)}"


@pytest.mark.slow
def test_the_environment_may_set_another_priority_of_actors(alone_with_ray: None, tmp_path: Path) -> None:
    assert priorities(os.environ | {"RAY_worker_niceness": "7"}, tmp_path) == f"nice {min(os.nice(0) + 7, 19)}"


@pytest.mark.slow
@pytest.mark.parametrize("num_actors", [1, 3])
def test_ray_writes_the_same_bytes_with_any_number_of_actors(reference, ray_session, tmp_path, num_actors):
    """Quick, of two actors: `test_killed_actors_lose_and_duplicate_nothing`."""
    config = elsewhere(reference, tmp_path, num_actors=num_actors)
    seen = []
    assert_whole(prepare(config, progress=seen.append, runner=run_on_ray), seen[-1], config, reference)


def assert_whole(report, last, config, reference):
    """What was written is the reference's store, and what is said of it."""
    assert contents(config.store) == contents(reference.store)
    assert report.units_written == report.units_total == last.units_done > 6
    assert report.identity == TokenStore.open(reference.store).identity()
    assert last.documents == 600 and last.eta_seconds == 0
    assert last.documents_per_second > 0 and last.megabytes_per_second > 0 and last.tokens_per_second > 0
    assert prepare(config).units_written == 0


def test_killed_actors_lose_and_duplicate_nothing(reference, ray_session, tmp_path):
    config = elsewhere(reference, tmp_path, num_actors=2)
    killed, seen = [], []

    def kill_one(progress):
        seen.append(progress)
        if not killed:
            for pid in actor_pids():
                if is_descendant(pid, os.getpid()):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break

    report = prepare(config, progress=kill_one)
    assert killed
    assert_whole(report, seen[-1], config, reference)


# The node's program begins 45 s after its process; Ray itself waits 30 s for it.
SLOW_NODE = """
import sys, time
from pathlib import Path
from amfm.data_pipeline.prepare.ray_actors import choose_token
choose_token()
from ray._private import services
from amfm.data_pipeline.prepare.ray_actors import running_ray

slow = Path(sys.argv[1], "raylet")
slow.write_text(f'#!/bin/sh\\nsleep 45\\nexec {services.RAYLET_EXECUTABLE} "$@"\\n')
slow.chmod(0o755)
services.RAYLET_EXECUTABLE = str(slow)
began, heard = time.monotonic(), []
with running_ray(None, 1, lambda what, *_: heard.append(what)):
    print(heard, time.monotonic() - began > 45)
"""


@pytest.mark.slow
def test_ray_starts_where_its_node_is_not_served_for_longer_than_ray_itself_waits(
    alone_with_ray: None, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SLOW_NODE, str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], check=False, capture_output=True, text=True, timeout=900
    )
    assert done.stdout.splitlines()[-1:] == ["['starting Ray'] True"], done.stderr


def test_a_node_that_ended_is_not_waited_for(ray_session: None) -> None:
    """And Ray has what its patience takes the place of, in the words that it is known by."""
    import psutil
    from ray._private import node

    assert is_node_alive()
    own = psutil.Process()
    assert [child.name() for child in own.children()].count(NODE) == 1
    assert "ray._private.services.get_node(" in Path(node.__file__).read_text(encoding="utf-8")


WITH_TOKEN = """
import os, subprocess, sys
from amfm.data_pipeline.prepare.ray_actors import running_ray
with running_ray(None, 1):
    import ray
    address = ray.get_runtime_context().gcs_address
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")} | {"HOME": "/nowhere"}
    words = f"import ray; ray.init({address!r}); print(ray.nodes())"
    sys.exit(subprocess.run([sys.executable, "-c", words], env=stranger, stderr=subprocess.DEVNULL).returncode == 0)
"""


@pytest.mark.slow
def test_a_stranger_cannot_join_a_ray_of_our_own() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", WITH_TOKEN], env=environment, cwd=root, check=True, timeout=PATIENCE_SECONDS)


def test_an_address_at_which_nothing_answers_is_one_message_at_once(capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        ValueError, match=rf"--address 127.0.0.1:{port}: no Ray cluster answers there .*`ray start --head`"
    ):
        start_ray(f"127.0.0.1:{port}")
    assert capfd.readouterr().err == ""
