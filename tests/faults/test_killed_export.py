"""kill -9 of an export before each of its changes of the disk: OUT is absent or whole, and the next export is equal."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.train import train
from tests.faults.disk import fault, with_faults
from tests.pretrain.tiny_run import tiny_config

KILLS = 14  # disk.c knows 16 rules
EXPORT = """
import os, sys
from pathlib import Path
from amfm.pretrain.export.export import export_checkpoint
place = Path(sys.argv[1])
for number in range(int(sys.argv[2])):
    switch, out = place / f"{number}.on", place / f"out{number}"
    pid = os.fork()
    if pid == 0:
        try:
            switch.touch()
            export_checkpoint(place / "run", out, verify=False)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    switch.unlink()
    print(number, status, flush=True)
"""


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the model card, which names the folder."""
    files = [path for path in folder.iterdir() if path.name != "README.md"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_an_export_killed_anywhere_leaves_nothing_or_all_of_it(data: DataConfig, tmp_path: Path) -> None:
    assert train(tiny_config(data, tmp_path / "run", train__stop_after_steps=1)) == 0
    export_checkpoint(tmp_path / "run", tmp_path / "straight", verify=False)
    whole = digests(tmp_path / "straight")
    rules = [
        fault("*", f"{tmp_path}/*out{number}[!0-9]*", "kill", after=int(1.7**number), when=tmp_path / f"{number}.on")
        for number in range(KILLS)
    ]
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path), str(KILLS)],
        env=with_faults(rules),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ends = [os.waitstatus_to_exitcode(int(line.split()[1])) for line in done.stdout.splitlines()]
    assert len(ends) == KILLS and set(ends) <= {0, -9} and ends.count(-9) >= 5, ends
    for number in range(KILLS):
        out = tmp_path / f"out{number}"
        if out.exists():
            assert digests(out) == whole, number
        else:
            export_checkpoint(tmp_path / "run", out, verify=False)
            assert digests(out) == whole, number
