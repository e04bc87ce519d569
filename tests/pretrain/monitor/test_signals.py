"""Signals that ask a run to stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.terminal import CTRL_C, Terminal

ROOT = Path(__file__).parents[3]
# Waits as a rank does in a collective whose other side is gone: in C, if no Python handler runs.
STUCK = (
    "import pathlib, sys, time\n"
    "from amfm.pretrain.monitor.signals import SignalWatch\n"
    "with SignalWatch(announces=True) as watch:\n"
    "    print('ready', flush=True)\n"
    "    while not watch.received: time.sleep(0.01)\n"
    "    print('saving', flush=True)\n"
    "    import threading; threading.Event().wait()\n"
)


def test_ctrl_c_is_answered_and_a_second_one_ends_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    assert process.stderr is not None
    said = process.stderr.readline() + process.stderr.readline()
    assert "stopping after this step and saving; Ctrl-C again ends now" in said
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    # By the signal itself: no Python handler ran, and nothing else would have ended it.
    assert process.returncode == -signal.SIGINT and "Traceback" not in rest


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_at_a_terminal_saves_and_the_next_start_resumes_bit_for_bit(
    nproc: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(directory: str, *more: str) -> list[str]:
        settings = ["configs/probes/mqar.yaml", f"run.dir={tmp_path / directory}", "train.steps=12"]
        settings += ["train.micro_batch_size=16", "train.validate_every_steps=null", "schedule.warmup_steps=2"]
        return ["train", *settings, "--nproc", str(nproc), *more]

    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # as users do
    assert Terminal(*command("whole")).end() == 0
    cut = Terminal(*command("cut"))
    cut.wait_for_lines(tmp_path / "cut" / "metrics.jsonl", 3)
    cut.type(CTRL_C)
    assert cut.end() == 130
    assert "stopping after this step and saving" in cut.screen
    assert Terminal(*command("cut")).end() == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_closed_terminal_saves_the_step(nproc: int, tmp_path: Path) -> None:
    settings = ["configs/probes/mqar.yaml", f"run.dir={tmp_path}", "train.steps=400", "schedule.warmup_steps=2"]
    window = Terminal("train", *settings, "train.micro_batch_size=16", "--nproc", str(nproc))
    window.wait_for_lines(tmp_path / "metrics.jsonl", 3)
    assert window.close() == 0
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["name"]) == ("signal", "SIGHUP")
    assert (tmp_path / f"checkpoints/step-{len(losses(tmp_path)):08d}/manifest.json").exists()


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_signal_before_the_run_is_taken_over_by_its_watch_and_the_system_s_action_returns() -> None:
    program = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests may run below nohup themselves
        "from amfm.pretrain.monitor.signals import SignalWatch, note_signals\n"
        "note_signals()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "with SignalWatch() as watch:\n"
        "    assert watch.received == signal.SIGUSR1\n"
        "with SignalWatch() as watch:\n"
        "    assert watch.received == 0\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    assert watch.received == signal.SIGHUP\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGTERM


def test_a_run_below_nohup_outlives_its_terminal() -> None:
    program = (
        "import os, signal\n"
        "from amfm.pretrain.monitor.signals import SignalWatch\n"
        "with SignalWatch() as watch:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    assert watch.received == 0\n"
    )
    assert subprocess.run(["nohup", sys.executable, "-c", program], check=False).returncode == 0


def test_only_training_outlives_a_signal_while_it_loads() -> None:
    """`amfm train` notes it from its first line on; every other verb ends, as programs do."""
    program = (
        "import os, signal, sys\n"
        "class Killer:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'amfm.launch.cli': os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.meta_path.insert(0, Killer())\n"
        "from amfm.launch.__main__ import main\n"
        "main()\n"
    )
    codes = [
        subprocess.run([sys.executable, "-c", program, verb, "--help"], capture_output=True, check=False).returncode
        for verb in ("train", "plan")
    ]
    assert codes == [0, -signal.SIGUSR1]
