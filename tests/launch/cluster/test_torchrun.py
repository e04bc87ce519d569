"""torchrun's command lines, and runs on two `hosts` of this machine behind a shell that stands where ssh stands."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from amfm.launch.cli import run
from amfm.launch.cluster.torchrun import NodeCommand, read_hosts
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.opening.log import find_restart_cause
from tests.pretrain.tiny_run import tiny_config, tiny_data


def write_config(folder: Path, **overrides: object) -> RunConfig:
    config = tiny_config(
        tiny_data(folder / "data"),
        folder / "run",
        **{"train__steps": 200, "train__global_batch_size": 12, "train__checkpoint_every_steps": 10, **overrides},
    )
    (folder / "run.yaml").write_text(resolved_yaml(config))
    return config


def test_each_node_has_its_own_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path)
    path = str(tmp_path / "run.yaml")
    arguments = ["launch", path, "train.seed=3", "--on", "torchrun", "--nodes", "3", "--nproc-per-node", "2"]
    assert run([*arguments, "--master", "first:1234", "--dry-run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[6] for line in lines] == ["--node-rank=0", "--node-rank=1", "--node-rank=2"]
    assert lines[1][:4] == [sys.executable, "-P", "-m", "torch.distributed.run"]
    assert {"--nnodes=3", "--nproc-per-node=2", "--master-addr=first", "--master-port=1234"} < set(lines[1])
    assert (
        run([*arguments, "launch.environment={NCCL_DEBUG: INFO}", "--master", "first:1234", "--dry-run", "--json"]) == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert (shown["launcher"], shown["nodes"], len(shown["commands"])) == ("torchrun", 3, 3)
    assert shown["commands"][0].startswith(f"env NCCL_DEBUG=INFO {sys.executable} -P")
    assert lines[1][-8:] == ["--no-python", sys.executable, "-P", "-m", "amfm.launch", "train", path, "train.seed=3"]


def test_a_line_for_a_host_goes_to_the_directory_sets_up_and_says_why_it_starts_again() -> None:
    command = NodeCommand(["train", "run.yaml"], 2, 8, 1, "first", 29500, "module load cuda", {"NCCL_DEBUG": "INFO"})
    line = command.shell_line(directory="/a b", pid_file="run/launch/node-1.pid", cause="rank 3 was lost")
    steps = line.split(" && ")
    assert steps[:3] == ["cd '/a b'", "echo $$ > run/launch/node-1.pid", "module load cuda"]
    assert steps[3].startswith(
        "exec env AMFM_LAUNCHER_PID=$$ env NCCL_DEBUG=INFO 'AMFM_RESTART_CAUSE=rank 3 was lost' "
    )


def test_torchrun_s_own_restarts_are_told_by_their_number() -> None:
    assert find_restart_cause({}) is find_restart_cause({"TORCHELASTIC_RESTART_COUNT": "0"}) is None
    assert find_restart_cause({"TORCHELASTIC_RESTART_COUNT": "2"}) == "torchrun started its ranks again, restart 2"
    assert find_restart_cause({"TORCHELASTIC_RESTART_COUNT": "2"}, "next_layout") is None
    named = {"AMFM_RESTART_CAUSE": "rank 3 was lost", "TORCHELASTIC_RESTART_COUNT": "0"}
    assert find_restart_cause(named) == "rank 3 was lost"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "torchrun", "--nodes", "3"], "needs --hosts FILE to start them all, or --node-rank and --master"),
        (["--on", "torchrun", "--nodes", "3", "--node-rank", "3", "--master", "a"], "must be less than --nodes 3"),
        (["--on", "torchrun", "--nodes", "3", "--node-rank", "1", "--master", "a:b"], "must be HOST or HOST:PORT"),
        (["--on", "torchrun", "--nodes", "3", "--node-rank", "1", "--master", "a:70000"], "a number from 1 to 65535"),
        (["--on", "ray", "--node-rank", "0"], "--node-rank 0 belongs to --on torchrun"),
        (["--on", "slurm", "--address", "auto"], "--address auto belongs to --on ray"),
        (["--on", "ray", "--nodes", "5"], "must be a multiple of train.micro_batch_size=2 x 5 data ranks"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path)
    assert run(["launch", str(tmp_path / "run.yaml"), "--nproc-per-node", "1", *options]) == 2
    assert message in capsys.readouterr().err


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


def start_on_two_hosts(tmp_path: Path) -> subprocess.Popen[str]:
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\nshift\nexec sh -c "$1"\n')
    shell.chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost\n127.0.0.1\n")
    command = [sys.executable, "-m", "amfm.launch", "launch", str(tmp_path / "run.yaml"), "--on", "torchrun"]
    options = ["--nodes", "2", "--nproc-per-node", "1", "--hosts", str(hosts), "--remote-shell", str(shell)]
    return subprocess.Popen([*command, *options, "--master", "localhost:29641"], stderr=subprocess.PIPE, text=True)


def find_ranks(tmp_path: Path) -> list[psutil.Process]:
    wanted = ["-m", "amfm.launch", "train", str(tmp_path / "run.yaml")]
    found = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-4:] == wanted]
    return [process for process in found if "torch.distributed.run" not in process.info["cmdline"]]


def wait_for_step(tmp_path: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    path = tmp_path / "run/metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.05)


def events(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_stopped_rank_ends_the_attempt_by_name_and_the_run_goes_on(tmp_path: Path) -> None:
    write_config(tmp_path, launch__heartbeat_seconds=6, train__timeout_seconds=300)
    launcher = start_on_two_hosts(tmp_path)
    wait_for_step(tmp_path, 15)
    stopped = next(process for process in find_ranks(tmp_path) if process.environ()["RANK"] == "1")
    os.kill(stopped.pid, signal.SIGSTOP)
    # The far rank is not ended by anybody while it is stopped; what ends it is the loss of its torchrun.
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    assert "no progress for" in errors
    assert "not seen any more: rank 1" in errors
    assert [event["event"] for event in events(tmp_path)].count("start") == 2
    assert "no progress" in str(next(event for event in events(tmp_path) if event["event"] == "restarted")["cause"])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_on_every_host(tmp_path: Path, number: signal.Signals, code: int) -> None:
    write_config(tmp_path, train__steps=2000)
    launcher = start_on_two_hosts(tmp_path)
    wait_for_step(tmp_path, 15)
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == code, errors
    assert ("interrupted; the ranks save and end" in errors) == (code == 130)
    assert events(tmp_path)[-1]["event"] == "signal"
    last_step = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert last_step < 2000
    assert (tmp_path / f"run/checkpoints/step-{last_step:08d}/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lost_rank_of_one_node_is_named_as_the_cause_and_the_end_is_json(tmp_path: Path) -> None:
    write_config(tmp_path, train__steps=60)
    command = [sys.executable, "-m", "amfm.launch", "launch", str(tmp_path / "run.yaml"), "--on", "torchrun", "--json"]
    options = ["--nproc-per-node", "2", "--master", "localhost:29642"]
    launcher = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 15)
    next(process for process in find_ranks(tmp_path) if process.environ()["RANK"] == "1").kill()
    output, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    (event,) = [event for event in events(tmp_path) if event["event"] == "restarted"]
    assert str(event["cause"]).startswith("localhost: ")
    end = json.loads(output)
    assert (end["launcher"], end["exit_code"], end["finished"], end["step"]) == ("torchrun", 0, True, 60)
