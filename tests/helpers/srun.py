"""Stands where srun, scontrol and sinfo stand, on a machine without Slurm: srun really starts its tasks, on this machine.

What it keeps of srun: a log for each task, the variables that a task reads its place from, and --kill-on-bad-exit, after
which it says which task failed and ends with the highest code. Nodes are names only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

NODES = ("node0", "node1")


def write_programs(folder: Path) -> None:
    """Put srun, scontrol and sinfo into a folder, for the front of PATH; every node is up."""
    programs = {
        "srun": f'exec {sys.executable} {__file__} "$@"',
        "scontrol": f'case "$*" in *hostnames*) printf "%s\\n" {" ".join(NODES)};; *) echo NodeAddr=127.0.0.1;; esac',
        "sinfo": ":",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options of a command line by name, and the command behind them."""
    count = next(place for place, word in enumerate(words) if not word.startswith("--"))
    return dict(word[2:].partition("=")[::2] for word in words[:count]), words[count:]


def copy(number: int, task: subprocess.Popen[bytes], log: Path) -> None:
    """Append a task's lines to its node's log with its number in front, as --label does."""
    assert task.stdout is not None
    with log.open("ab", buffering=0) as file:
        for line in task.stdout:
            file.write(b"%d: %s\n" % (number, line.rstrip(b"\n")))


def main(words: list[str]) -> int:
    """Start the tasks, wait for all of them, and return the highest code."""
    options, command = split(words)
    per_node = int(options["ntasks-per-node"])
    names = options.get("nodelist", ",".join(NODES)).split(",")
    tasks, copies = [], []
    for number in range(int(options["ntasks"])):
        places = {
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number % per_node),
            "SLURM_NODEID": str(number // per_node),
            "SLURMD_NODENAME": names[number // per_node],
        }
        if "output" in options:
            log = Path(options["output"].replace("%n", str(number // per_node)))
            task = subprocess.Popen(command, env=os.environ | places, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            copies.append(threading.Thread(target=copy, args=(number, task, log)))
            copies[-1].start()
        else:
            task = subprocess.Popen(command, env=os.environ | places)
        tasks.append(task)
    while any(task.poll() is None for task in tasks):
        if any(task.poll() for task in tasks) and options.get("kill-on-bad-exit") == "1":
            for task in tasks:
                task.terminate()
            break
        time.sleep(0.02)
    codes = [task.wait() for task in tasks]
    for copying in copies:
        copying.join()
    for number, code in enumerate(codes):
        if code:
            sys.stderr.write(f"srun: error: {names[number // per_node]}: task {number}: Exited with exit code {code}\n")
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
