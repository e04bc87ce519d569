"""What a start of each kind imports: modules are counted, since seconds are the machine's.

A contract of the product: more than half of what a start took were a compiler and libraries that nothing called.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from amfm.pretrain.config.file import resolved_yaml
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.tiny_run import MODEL, tiny_config, tiny_data

COMPILER = {
    *("torch._dynamo", "torch._inductor", "sympy", "networkx", "torch.distributed.tensor"),
    *("torch.distributed.pipelining", "torch.distributed.fsdp", "megatron.core.optimizer", "torch.nn.attention.varlen"),
}
HEAVY = {"torch", "ray", "zarr", "transformers", "deepspeed", "megatron"}
# With what has been imported after each of several command lines.
PROGRAM = """
import json, sys
from amfm.launch.cli import run
after = [(run(words), sorted(sys.modules)) for words in json.loads(sys.argv[1])]
print("\\n" + json.dumps(after))
"""
BUILDING = f"""
import amfm, sys
print(len([name for name in sys.modules if name.split(".")[0] in ("torch", "pydantic")]))
amfm.build({MODEL!r})
print("built", file=sys.stderr)
"""
Modules = list[tuple[int, set[str]]]


def run_each(*command_lines: list[str]) -> Modules:
    """Exit code of each command line, one after the other in a fresh process, and the modules that are there then."""
    return start(PROGRAM, command_lines, warnings="ignore")[1]


def start(
    program: str, command_lines: Sequence[list[str]], *, warnings: str
) -> tuple[subprocess.CompletedProcess[str], Modules]:
    """The same of a program that ends with PROGRAM, and what it said."""
    command = [sys.executable, "-W", warnings, "-c", program, json.dumps(command_lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS)
    return done, [(code, set(found)) for code, found in json.loads(done.stdout.splitlines()[-1])]


def test_help_imports_little_more_than_typer() -> None:
    ((code, found),) = run_each(["--help"])
    assert code == 0 and "typer.rich_utils" in found
    assert not found & (HEAVY | {"pydantic", "yaml", "numpy", "importlib.metadata"})
    assert {name for name in found if name.startswith("amfm.launch.commands")} == set()
    assert len(found) < 380, "340, of which typer has 320"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Modules, Path]:
    """A process that imported amfm, built a model, trained and planned: what it said, its modules, and the run's file."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(tiny_data(folder / "data"), folder / "run", train__steps=2, schedule__warmup_steps=1)
    (folder / "run.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    path = folder / "run.yaml"
    words = [["train", str(path)], ["plan", str(path), "--gpus", "1"]]
    return *start(BUILDING + PROGRAM, words, warnings="default"), path


def test_settings_are_refused_and_folders_inspected_without_torch(
    trained: tuple[object, object, Path], tmp_path: Path
) -> None:
    path = trained[2]
    (export := tmp_path / "export").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (export / name).write_text("{}", encoding="utf-8")
    (python := tmp_path / "python").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    refused = [
        ["train", str(path), change] for change in ("train.steps=0", "train.micro_batch_size=3", "model.pattern=q")
    ]
    refused += [["train", str(path), "schedule.warmup_steps=0"]]  # the run would continue with other settings
    refused += [
        ["profile", str(path.with_name("run"))],
        ["export", str(export), "--check", "vllm", "--client-python", str(python)],
    ]
    refused += [["launch", str(path), "--on", "slurm", "--nodes", "0"]]
    others = [
        ["config", str(path)],
        ["inspect", str(path.with_name("data") / "store"), "--quick"],
        ["doctor", "--quick"],
    ]
    found = run_each(*refused, *others)
    assert [code for code, _ in found] == [2] * 7 + [0] * 3
    assert not found[-1][1] & HEAVY


def test_importing_amfm_imports_nothing_building_warns_of_nothing_and_runs_and_plans_import_no_compiler(
    trained: tuple[subprocess.CompletedProcess[str], Modules, Path],
) -> None:
    """In one process: each imports what the one before it does, and some."""
    done, ((code, found), (plan_code, with_plan)), _ = trained
    assert done.stdout.startswith("0\n") and done.stderr.startswith("built\n")
    assert (code, plan_code) == (0, 0) and {"torch", "deepspeed", "megatron.core"} <= found
    if not torch.__version__.startswith("2.11."):  # which imports sympy with its own sharded tensors
        assert not found & COMPILER
        assert with_plan & COMPILER <= {"sympy"}, "sympy is imported by sums of tensors on the meta device"
    assert len(found) < 3100, "2,900, of which PyTorch has 1,230 and DeepSpeed 410; 4,900 with the compiler"


REST_OF_MEGATRON = """
import amfm.model.parallel.groups, sys
assert "megatron.core.optimizer" not in sys.modules
import megatron.core
from megatron.core import parallel_state
assert "megatron.core.optimizer" not in sys.modules, "one of its modules"
from megatron.core import DistributedDataParallel, __version__
assert megatron.core.optimizer is sys.modules["megatron.core.optimizer"]
import torch
assert torch.compile.__name__ == "compile" and "triton" not in {name for name, found in sys.modules.items() if found is None}
"""


@pytest.mark.slow
def test_who_asks_megatron_for_the_rest_gets_it() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REST_OF_MEGATRON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
