"""Runs on `hosts` of this machine behind a shell that stands where ssh stands: servers of ranks, checks, spares, failures."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from amfm.launch.cluster.hosts import HostServer, RemoteHosts, read_hosts
from tests.helpers.patience import PATIENCE_SECONDS
from tests.launch.cluster.test_torchrun import write_config


def test_a_line_for_a_host_goes_to_the_directory_sets_up_and_becomes_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    settings = {"nodes": 1, "ranks_per_node": 8, "port": 29500, "run_dir": "run", "remote_shell": ["ssh"]}
    words = ["train", "a b.yaml", "run.name=$(x)"]
    hosts = RemoteHosts(
        words, ["one", "two", "three"], **settings, setup="module load cuda", environment={"A": "b c"}, spares=1
    )
    commands = hosts.commands()
    assert [command[:2] for command in commands] == [["ssh", "one"], ["ssh", "two"]]
    line = commands[1][2]
    assert line.split(" && ")[:2] == [f"cd '{tmp_path}/a b'", "module load cuda"]
    assert shlex.split(line.split(" && ")[2]) == [
        *("exec", "env", "A=b c", sys.executable, "-P", "-m", "amfm.launch.node_server", "8", "1"),
        *words,
    ]


def test_a_file_of_hosts_is_read_without_remarks_and_refused_empty_or_double(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# rack 1\na\nb # the second\n\n")
    assert read_hosts(path) == ["a", "b"]
    path.write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="names a more than once"):
        read_hosts(path)
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="names no host"):
        read_hosts(path)


def test_all_hosts_are_told_to_end_before_one_is_waited_for(tmp_path: Path) -> None:
    hosts = RemoteHosts(
        ["train"], ["first", "last"], nodes=2, ranks_per_node=1, port=29500, run_dir=str(tmp_path), setup=None, remote_shell=["ssh"]
    )  # fmt: skip
    last = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
    until = f"while kill -0 {last.pid}; do sleep 0.05; done"  # ended, and waited for by its parent
    first = subprocess.Popen(["sh", "-c", until], stdin=subprocess.PIPE, start_new_session=True)
    threading.Thread(target=last.wait, daemon=True).start()
    hosts.servers = {name: HostServer(name, process) for name, process in (("first", first), ("last", last))}
    hosts.close()
    assert (first.returncode, last.returncode) == (0, 0), "neither was killed"
    assert hosts.servers == {}


def start_on_two_hosts(tmp_path: Path, nodes: int = 2, names: str = "localhost\n127.0.0.1\n") -> subprocess.Popen[str]:
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\n[ "$1" = nowhere ] && exit 255\nshift\nexec sh -c "$1"\n')
    shell.chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text(names)
    command = [sys.executable, "-m", "amfm.launch", "launch", str(tmp_path / "run.yaml"), "--on", "torchrun"]
    options = ["--nodes", str(nodes), "--nproc-per-node", "1", "--hosts", str(hosts), "--remote-shell", str(shell)]
    return subprocess.Popen([*command, *options, "--master", "localhost:29641"], stderr=subprocess.PIPE, text=True)


def find_rank(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """A rank below the launcher; forked ones have a name and no command line of their own."""
    processes = psutil.Process(launcher.pid).children(recursive=True)
    return next(process for process in processes if process.name() == f"amfm-rank-{rank}")


def wait_for_step(tmp_path: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    path = tmp_path / "run/metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.05)


def wait_for_event(tmp_path: Path, name: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while name not in [event["event"] for event in events(tmp_path)]:
        assert time.monotonic() < deadline, f"no event {name}"
        time.sleep(0.05)


def events(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_stopped_rank_ends_the_attempt_by_name_and_the_run_goes_on(tmp_path: Path) -> None:
    write_config(tmp_path, launch__heartbeat_seconds=6, train__timeout_seconds=300)
    launcher = start_on_two_hosts(tmp_path)
    wait_for_step(tmp_path, 15)
    find_rank(launcher, 1).suspend()
    _, errors = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 0, errors
    assert "no progress for" in errors
    assert "not seen any more: rank 1" in errors
    assert [event["event"] for event in events(tmp_path)].count("start") == 2
    assert "no progress" in str(next(event for event in events(tmp_path) if event["event"] == "restarted")["cause"])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_on_every_host(tmp_path: Path, number: signal.Signals, code: int) -> None:
    write_config(tmp_path, train__steps=2000)
    launcher = start_on_two_hosts(tmp_path)
    wait_for_step(tmp_path, 15)
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == code, errors
    assert ("interrupted; the ranks save and end" in errors) == (code == 130)
    assert events(tmp_path)[-1]["event"] == "signal"
    last_step = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert last_step < 2000
    assert (tmp_path / f"run/checkpoints/step-{last_step:08d}/manifest.json").exists()


@pytest.mark.slow
def test_a_lost_rank_of_one_node_is_named_as_the_cause_and_the_end_is_json(tmp_path: Path) -> None:
    write_config(tmp_path, train__steps=60)
    command = [sys.executable, "-m", "amfm.launch", "launch", str(tmp_path / "run.yaml"), "--on", "torchrun", "--json"]
    options = ["--nproc-per-node", "2", "--master", "localhost:29642"]
    launcher = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 15)
    find_rank(launcher, 1).kill()
    output, errors = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 0, errors
    (event,) = [event for event in events(tmp_path) if event["event"] == "restarted"]
    assert str(event["cause"]).startswith("localhost: ")
    end = json.loads(output)
    assert (end["launcher"], end["exit_code"], end["finished"], end["step"]) == ("torchrun", 0, True, 60)


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_lost_host_and_one_that_does_not_answer_is_passed_over(tmp_path: Path) -> None:
    write_config(tmp_path, launch__spare_nodes=1, train__steps=60)
    launcher = start_on_two_hosts(tmp_path, names="localhost\nnowhere\n127.0.0.1\n127.0.0.2\n")
    wait_for_step(tmp_path, 15)
    # The second host loses its power: server and rank at once.
    server = find_rank(launcher, 1).parent()
    assert server is not None
    before = {process.pid for process in psutil.Process(launcher.pid).children(recursive=True)} - {server.pid}
    for process in [server, *server.children(recursive=True)]:
        process.kill()
    wait_for_event(tmp_path, "restarted")
    spare = find_rank(launcher, 1).parent()
    assert spare is not None and spare.pid in before, "the one that waited, with everything loaded"
    _, errors = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, errors
    assert "nowhere does not answer: " in errors and "continuing with" not in errors
    (event,) = [event for event in events(tmp_path) if event["event"] == "restarted"]
    assert str(event["cause"]).startswith("127.0.0.1: ")
    assert json.loads((tmp_path / "run/launch/excluded_nodes.json").read_text()) == {
        "excluded": {},
        "losses": {"127.0.0.1": 1},
    }
