"""A package of examples/ as if it were installed, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def install_example(name: str, folder: Path) -> list[Path]:
    """Write the metadata that pip would; returns the paths with which Python finds the package and its entry points."""
    project = tomllib.loads((ROOT / "examples" / name / "pyproject.toml").read_text())["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return [folder, ROOT / "examples" / name]


def amfm(*words: str | Path, packages: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line of amfm with these packages, on one thread."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (*packages, ROOT / "src"))),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "amfm.launch", *map(str, words)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
