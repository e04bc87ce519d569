"""A package of examples/ as if it were installed, in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.processes.zygote import BARE, run_program

ROOT = Path(__file__).parents[2]


def install_example(name: str, folder: Path) -> list[Path]:
    """Write the metadata that pip would, of what it depends on too and of the tasks that small runs train on; returns the paths
    with which Python finds the packages and their entry points.
    """
    names = [name, "synthetic"]
    for each in names:
        project = tomllib.loads((ROOT / "examples" / each / "pyproject.toml").read_text())["project"]
        needed = [other for other in project["dependencies"] if "amfm-" in other and "amfm-pretrain" not in other]
        names += {other.removeprefix("amfm-").replace("-", "_") for other in needed} - {*names}
        metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir(parents=True, exist_ok=True)
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = [
            line
            for group, entries in project["entry-points"].items()
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
        ]
        (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return [folder, *(ROOT / "examples" / each for each in names)]


def amfm(*words: str | Path, packages: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line of amfm with these packages."""
    return run_module("amfm.launch", *words, packages=packages, cwd=cwd)


def run_module(
    module: str, *words: str | Path, packages: list[Path], cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a module as a program, likewise."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*packages, ROOT / "src")))}
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, words)]
    return run_program(command, env=environment, cwd=cwd, zygote=BARE)


def must(*words: str | Path, packages: list[Path]) -> str:
    """Run a command line of amfm that has to succeed; returns what it printed."""
    done = amfm(*words, packages=packages, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_probe(folder: Path, task: dict[str, Any], model: dict[str, Any], **train: Any) -> Path:
    """Write a configuration of a small model on a synthetic task (docs/synthetic_tasks.md)."""
    settings = {"micro_batch_size": 64, "global_batch_size": 64, "precision": "float32", "num_threads": 1}
    tree = {
        "run": {"dir": str(folder / "run"), "tensorboard": False},
        "model": {"hidden_size": 64, "initializer_range": 0.125, **model},
        "data": {"synthetic": task},
        "train": {"log_every_steps": 100, "validation_batches": 4, **settings, **train},
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def train_all(packages: list[Path], *runs: tuple[Path, list[str]]) -> None:
    """Train configurations with overrides one after the other, in one process that imports once."""
    words = [word for config, overrides in runs for word in (str(config), *overrides, "--")]
    done = run_module("tests.helpers.examples", *words, packages=[*packages, ROOT], cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The line of each step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_a_cut_changes_nothing(config: Path, folder: Path, packages: list[Path], *, stop: int) -> None:
    """Train a configuration in one piece, and stopped after `stop` steps and started again: every loss is equal."""
    whole, cut = (f"run.dir={folder / name}" for name in ("whole", "cut"))
    train_all(packages, (config, [whole]), (config, [cut, f"train.stop_after_steps={stop}"]), (config, [cut]))
    losses = [[line["loss"] for line in metrics_of(folder / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) > stop


def main(words: list[str]) -> int:
    """Train what `train_all` asks for; returns the first exit code that is not 0."""
    from amfm.pretrain.config.file import load_config
    from amfm.pretrain.train import train

    while words:
        end = words.index("--")
        config, *overrides = words[:end]
        code = train(load_config(config, overrides))
        if code:
            return code
        words = words[end + 1 :]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
