"""Runs of a process that a faulty disk was put in front of: each in a separate fork, its faults on while a file exists.

Called as `python -m tests.faults.storage_child FOLDER`, which holds jobs.json: the data, and for each name (of a
fault, or any other) run directory, settings and number of ranks. Writes results.json: by name exit code and words of each rank.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from amfm.data_pipeline.config import DataConfig
from tests.faults.attempt import Attempt

if __name__ == "__main__":
    place = Path(sys.argv[1])
    jobs = json.loads((place / "jobs.json").read_text())
    data = DataConfig.model_validate(jobs["data"])
    results = {}
    for name, job in jobs["runs"].items():
        run_dir = place / job["run"]
        run_dir.mkdir(exist_ok=True)
        switch = place / f"{name}.on"
        switch.touch()
        attempt = Attempt(data, run_dir, job["settings"], job["ranks"])
        attempt.start()
        codes = attempt.finish()
        switch.unlink(missing_ok=True)  # who waits for this run may have ended its faults before
        said = [
            path.read_text() if (path := run_dir / f"error-{rank}.txt").exists() else "" for rank in range(job["ranks"])
        ]
        for rank in range(job["ranks"]):
            (run_dir / f"error-{rank}.txt").unlink(missing_ok=True)
        results[name] = {"codes": codes, "said": said}
    (place / "results.json").write_text(json.dumps(results))
    os._exit(0)
