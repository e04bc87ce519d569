"""`amfm prepare` killed by SIGKILL at chosen shares of its parts, and called again: what is left, what is written twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.finished_units import JOURNAL
from benchmarks import ROOT
from benchmarks.preparation.processes import MemoryWatch, below, memory_by_tenth, title

POLL_SECONDS = 0.25
GONE_SECONDS = 120.0


def prepare_with_kills(
    config: DataConfig, num_units: int, shares: Sequence[float], work: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    """Call `amfm prepare` until the store is whole, killing it each time that a share of its units is in the journal.

    Returns identity, kills (units in the journal at each, and the seconds until its processes were gone), the units that the
    calls together wrote, and the memory of the last call by tenths. RuntimeError if a call ends before it is killed, or leaves
    processes.
    """
    settings = work / "killed.yaml"
    settings.write_text(
        yaml.safe_dump(
            {
                "extends": str(ROOT / "configs/tiny_cpu.yaml"),
                "data": config.model_dump(mode="json", exclude={"synthetic"}),
            }
        )
    )
    journal, kills = Path(config.text_store()) / JOURNAL, []
    for share in shares:
        process = _start(settings)
        while _lines(journal) < share * num_units:
            if process.poll() is not None:
                raise RuntimeError(f"amfm prepare ended with code {process.returncode} before it was killed")
            time.sleep(POLL_SECONDS)
        children = below(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        gone = _wait_until_gone(children)
        kills.append({"units": _lines(journal), "seconds_until_gone": gone})
        report(f"killed at {kills[-1]['units']} of {num_units} parts; its processes were gone after {gone:.1f} s")
    process = _start(settings)
    with MemoryWatch(process.pid).watching() as watch:
        answer, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"amfm prepare ended with code {process.returncode}")
    made = json.loads(answer)
    return {
        "identity": made["identity"],
        "kills": kills,
        "units_in_journal": _lines(journal),
        "memory": memory_by_tenth(watch.samples),
    }


def _start(settings: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "amfm.launch", "prepare", str(settings), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _lines(journal: Path) -> int:
    """Units in the journal."""
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def _wait_until_gone(children: set[int]) -> float:
    """Seconds until the processes below a killed one have ended; RuntimeError if they stay."""
    began = time.monotonic()
    while left := {pid for pid in children if title(pid)}:
        if time.monotonic() - began > GONE_SECONDS:
            raise RuntimeError(f"{len(left)} processes of a killed amfm prepare are there after {GONE_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began
