"""The batch script by its text, and where Slurm is installed a real cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from amfm.launch.cli import run
from amfm.launch.cluster import slurm
from amfm.launch.cluster.slurm import Allocation, write_script
from amfm.launch.cluster.supervise import Attempt, Outcome
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.report.data import read_run
from tests.helpers.json_output import one_object
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.tiny_run import tiny_config, tiny_data

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
HAS_SLURM = os.geteuid() == 0 and all(shutil.which(name) for name in PROGRAMS)

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
NodeName=n[1-2] NodeHostname={host} Port=[{first}-{second}] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    # Slow enough for a signal to arrive in the middle.
    config = tiny_config(
        tiny_data(tmp_path / "data"),
        tmp_path / "run",
        train__steps=400,
        train__global_batch_size=12,
        train__checkpoint_every_steps=20,
        launch__slurm={"gpus": False, "time_limit": "00:10:00", "signal_seconds": 60},
    )
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    return config


def test_the_script_asks_for_what_the_configuration_says(tmp_path: Path) -> None:
    config = tiny_config(
        tiny_data(tmp_path / "data"),
        tmp_path / "run",
        launch__setup="source env/bin/activate",
        launch__environment={"NCCL_SOCKET_IFNAME": "ib0"},
        launch__slurm={
            "partition": "main",
            "time_limit": "1-00:00:00",
            "memory": "0",
            "modules": ["cuda/12.8", "gcc"],
            "cpus_per_task": 12,
            "cpu_bind": "rank_ldom",
            "extra": ["--constraint=h100"],
        },
    )
    arguments = ["launch", "a b.yaml", "--on", "slurm"]
    script = write_script(config, arguments, ["train", "a b.yaml"], nodes=4, ranks_per_node=8)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--mem=0",
        "--cpus-per-task=12",
        "--partition=main",
        "--time=1-00:00:00",
        "--signal=USR1@180",
        "--open-mode=append",
        "--requeue",
        "--constraint=h100",
        f"--output={tmp_path}/run/logs/slurm-%j.log",
    ):
        assert f"#SBATCH {line}" in lines
    assert lines[-3:-1] == ["module load cuda/12.8 gcc", "source env/bin/activate"]
    srun = next(line for line in lines if line.startswith("#   "))
    assert srun.startswith(
        "#   env NCCL_SOCKET_IFNAME=ib0 srun --nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=12 "
        "--cpu-bind=rank_ldom"
    )
    assert f"--label --output={tmp_path}/run/logs/job-JOB/attempt-0/node-%n.log --open-mode=append" in srun
    assert srun.endswith(f"rank {sys.executable} -P -m amfm.launch train 'a b.yaml'")
    assert lines[-1] == f"exec {sys.executable} -P -m amfm.launch launch 'a b.yaml' --on slurm"


def test_the_script_is_what_a_dry_run_prints(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "run.yaml")
    arguments = ["launch", path, "--on", "slurm", "--nodes", "2", "--nproc-per-node", "1"]
    assert run([*arguments, "--dry-run"]) == 0
    script = write_script(config, arguments, ["train", path], nodes=2, ranks_per_node=1)
    assert capsys.readouterr().out == script
    assert run([*arguments, "--dry-run", "--json"]) == 0
    assert one_object(capsys.readouterr().out) | {"warning": None} == {
        "launcher": "slurm", "nodes": 2, "ranks_per_node": 1, "warning": None, "script": script,
    }  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="sbatch is installed")
def test_without_sbatch_the_script_stays_for_a_login_node(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert run(["launch", str(tmp_path / "run.yaml"), "--on", "slurm", "--nproc-per-node", "1"]) == 3
    assert "sbatch is not on this machine" in capsys.readouterr().err
    assert (tmp_path / "run/launch/job.sbatch").exists()


def test_the_cause_of_a_failure_is_kept_above_a_long_traceback(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "scontrol": "echo n1",
        "sinfo": ":",
        "srun": "echo starting; echo 'amfm: rank 1: no progress'; seq 200; echo 'srun: error: n1: task 1'; exit 3",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    allocation = Allocation(config, ["train"], ranks_per_node=2)
    assert allocation.start(Attempt(0, 1, None)) == Outcome(3, "amfm: rank 1: no progress")


def test_a_signal_that_ends_a_rank_before_its_first_line_is_no_failure(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "sinfo": ":",
        "scontrol": "echo n1",
        "srun": "echo 'srun: error: n1: task 0: User defined signal 1'; exit 138",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    allocation = Allocation(config, ["train"], ranks_per_node=2)
    assert allocation.start(Attempt(0, 1, None)) == Outcome(0, began=False)
    assert allocation.was_signalled


@pytest.mark.parametrize("requeue", [True, False])
def test_a_job_in_which_slurm_starts_no_step_is_left_after_some_tries(
    requeue: bool, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = "srun: error: Unable to create step for job 7: Requested node configuration is not available"
    for name, text in {"sinfo": ":", "scontrol": "echo n1", "srun": f"echo '{error}'; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setattr(slurm, "REFUSED_SECONDS", 0.0)
    own = config.launch.slurm.model_copy(update={"requeue": requeue})
    launch_section = config.launch.model_copy(update={"slurm": own})
    allocation = Allocation(config.model_copy(update={"launch": launch_section}), ["train"], ranks_per_node=2)
    outcomes = [allocation.start(Attempt(0, 1, None)) for _ in range(slurm.MAX_REFUSED)]
    assert outcomes[:-1] == [Outcome(3, error, began=False)] * (slurm.MAX_REFUSED - 1), "no attempt of the run"
    assert outcomes[-1] == (Outcome(0, began=False) if requeue else Outcome(3, error))
    assert allocation.is_lost()


def test_each_node_has_a_log_and_the_failed_rank_names_the_cause(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "run/logs/job-7/attempt-1"
    logs.mkdir(parents=True)
    (logs / "node-0.log").write_text("1: amfm: of the job before\n")
    write = f"printf '0: amfm: lost\\n1: amfm: NaN\\n' >> {logs}/node-0.log"
    programs = {
        "scontrol": "echo n1",
        "sinfo": ":",
        "srun": f"echo \"$@\" > {tmp_path}/words; echo $NCCL_DEBUG; {write}; echo 'srun: error: n1: task 1: Exited'; exit 3",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    own = config.launch.slurm.model_copy(update={"container_image": "image.sqsh", "container_mounts": "/a:/a"})
    launch_section = config.launch.model_copy(update={"slurm": own, "environment": {"NCCL_DEBUG": "INFO"}})
    allocation = Allocation(config.model_copy(update={"launch": launch_section}), ["train"], ranks_per_node=2)
    assert allocation.start(Attempt(1, 1, "lost")) == Outcome(3, "amfm: NaN")
    shown = capsys.readouterr().err
    assert "INFO" in shown and "\namfm: lost\n" in shown and "NaN" not in shown and "of the job before" not in shown
    words = (tmp_path / "words").read_text()
    assert f"--container-image=image.sqsh --container-workdir={os.getcwd()} --container-mounts=/a:/a" in words
    assert words.endswith("rank python3 -P -m amfm.launch train\n")


def test_a_percent_sign_in_the_run_directory_is_a_letter_for_slurm(tmp_path: Path) -> None:
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run 5% %j")
    script = write_script(config, ["launch"], ["train"], nodes=1, ranks_per_node=1)
    (output,) = [line for line in script.splitlines() if line.startswith("#SBATCH --output=")]
    assert output == f"#SBATCH --output='{tmp_path}/run 5%% %%j/logs/slurm-%j.log'"


def test_a_run_that_a_job_has_already_is_not_submitted_again_except_behind_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(config.run.dir) / "launch/job.sbatch"
    programs = {"squeue": f"echo 6 RUNNING /other; echo 7 RUNNING {script}", "sbatch": "echo Submitted batch job 8"}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    command = ["launch", str(tmp_path / "run.yaml"), "--on", "slurm", "--nproc-per-node", "1"]
    assert run(command) == 2
    said = capsys.readouterr().err
    assert "job 7 (running) has this run already" in said and "--dependency=afterany:7" in said
    assert run([*command, "launch.slurm.extra=['--dependency=afterany:7']"]) == 0


@pytest.mark.parametrize(("name", "value"), [("A B", "x"), ("NCCL", "a\nb")])
def test_a_variable_that_would_be_more_than_one_is_refused(
    config: RunConfig, tmp_path: Path, name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "launch",
        str(tmp_path / "run.yaml"),
        f"launch.environment={{{json.dumps(name)}: {json.dumps(value)}}}",
    ]
    assert run([*arguments, "--on", "slurm", "--nproc-per-node", "1", "--dry-run"]) == 2
    assert "launch.environment" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["launch.slurm.time_limit=20", "launch.slurm.memory=0"])
def test_numbers_as_slurm_users_write_them_are_taken(
    config: RunConfig, tmp_path: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["launch", str(tmp_path / "run.yaml"), override, "--on", "slurm", "--nproc-per-node", "1", "--dry-run"]
    assert run(arguments) == 0
    assert f"#SBATCH --{'time' if 'time' in override else 'mem'}={override.split('=')[1]}\n" in capsys.readouterr().out


def test_near_its_time_limit_a_job_starts_no_further_attempt(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm signals once: ranks that start later are killed at the limit, and such a job is not queued again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    allocation = Allocation(config, ["train"], ranks_per_node=1)
    assert not allocation.is_ending()  # a job without a limit
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert not allocation.is_ending()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + config.launch.slurm.signal_seconds + 60))
    assert allocation.is_ending() and allocation.start(Attempt(1, 1, "lost")) == Outcome(0, began=False)


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """munge, a controller and two nodes, all on this machine and of this test."""
    folder = tmp_path / "slurm"
    for name in ("state", "munge"):
        (folder / name).mkdir(parents=True)
    host, ports = socket.gethostname().partition(".")[0], [free_port() for _ in range(3)]
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(folder=folder, host=host, port=ports[0], first=ports[1], second=ports[2]))
    # slurm.conf writes the two ports of n[1-2] as a range of two, which the system rarely gives side by side.
    conf.write_text(
        conf.read_text().replace(
            f"NodeName=n[1-2] NodeHostname={host} Port=[{ports[1]}-{ports[2]}]",
            f"NodeName=n1 NodeHostname={host} Port={ports[1]} CPUs=2 State=UNKNOWN\n"
            f"NodeName=n2 NodeHostname={host} Port={ports[2]}",
        )
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
        + [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "seed", "log")],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    processes = []
    for daemon in daemons:
        processes.append(subprocess.Popen(daemon, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(1)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (ask("sinfo", "-h", "-t", "idle", "-o", "%D") or "0") != "2":
        assert time.monotonic() < deadline, ask("sinfo")
        time.sleep(0.5)
    yield
    ask("scancel", "--user=root")
    time.sleep(1)
    for process in reversed(processes):
        process.terminate()
        process.wait(timeout=PATIENCE_SECONDS)


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SLURM, reason="needs root and Debian's slurm-wlm and munge")
def test_a_job_saves_before_its_time_limit_is_queued_again_and_finishes(
    cluster: None, config: RunConfig, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "amfm.launch", "launch", str(tmp_path / "run.yaml"), "--on", "slurm"]
    command += ["--nodes", "2", "--nproc-per-node", "1"]
    script = tmp_path / "script.sbatch"
    script.write_text(subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True).stdout)
    assert subprocess.run(["sbatch", "--test-only", str(script)], check=False).returncode == 0

    submitted = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = submitted.split()[-1]
    assert submitted.startswith("Submitted batch job")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert time.monotonic() < deadline, (tmp_path / f"run/logs/slurm-{job}.log").read_text()
        time.sleep(0.2)
    # What the controller does when the time limit comes near.
    assert subprocess.run(["scancel", "--signal=USR1", job], check=False).returncode == 0
    while "queued again" not in (log := (tmp_path / f"run/logs/slurm-{job}.log").read_text()):
        assert time.monotonic() < deadline, log
        time.sleep(0.2)
    # Slurm holds a job back for a while after a requeue; the user needs not wait.
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not read_run(tmp_path / "run").is_finished():
        subprocess.run(["scontrol", "release", job], capture_output=True, check=False)
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True, check=False)
        assert time.monotonic() < deadline, (tmp_path / f"run/logs/slurm-{job}.log").read_text()
        time.sleep(0.5)
    assert "resumed from" in (tmp_path / f"run/logs/slurm-{job}.log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SLURM, reason="needs root and Debian's slurm-wlm and munge")
def test_the_doctor_runs_once_as_a_job_and_its_findings_are_in_the_log(
    cluster: None, config: RunConfig, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "amfm.launch", "launch", str(tmp_path / "run.yaml"), "--on", "slurm"]
    command += ["--nodes", "2", "--nproc-per-node", "1", "--doctor"]
    job = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    log = tmp_path / f"run/logs/slurm-{job}.log"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while ask("squeue", "-h", "-j", job, "-o", "%T"):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    assert "JobState=COMPLETED" in ask("scontrol", "show", "job", job), log.read_text()
    text = log.read_text()
    assert "shared storage" in text
    assert "GB/s by each of 2 ranks" in text
    assert "FAIL" not in text
    assert not (tmp_path / "run/metrics.jsonl").exists()
