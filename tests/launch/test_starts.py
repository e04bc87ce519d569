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


def test_settings_are_refused_and_folders_inspected_without_torch(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    path = tmp_path / "run.yaml"
    path.write_text(resolved_yaml(tiny_config(data, tmp_path / "run")), encoding="utf-8")
    (tmp_path / "run").mkdir()
    (export := tmp_path / "export").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (export / name).write_text("{}", encoding="utf-8")
    (python := tmp_path / "python").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    refused = [
        ["train", str(path), change] for change in ("train.steps=0", "train.micro_batch_size=3", "model.pattern=q")
    ]
    refused += [
        ["profile", str(tmp_path / "run")],
        ["export", str(export), "--check", "vllm", "--client-python", str(python)],
    ]
    refused += [["launch", str(path), "--on", "slurm", "--nodes", "0"]]
    others = [["config", str(path)], ["inspect", data.store, "--quick"], ["doctor", "--quick"]]
    found = run_each(*refused, *others)
    assert [code for code, _ in found] == [2] * 6 + [0] * 3
    assert not found[-1][1] & HEAVY


def test_importing_amfm_imports_nothing_building_warns_of_nothing_and_a_run_imports_no_compiler(tmp_path: Path) -> None:
    """In one process: each imports what the one before it does, and some."""
    data = tiny_data(tmp_path / "data")
    path = tmp_path / "run.yaml"
    path.write_text(
        resolved_yaml(tiny_config(data, tmp_path / "run", train__steps=2, schedule__warmup_steps=1)), encoding="utf-8"
    )
    done, ((code, found),) = start(BUILDING + PROGRAM, [["train", str(path)]], warnings="default")
    assert done.stdout.startswith("0\n") and done.stderr.startswith("built\n")
    assert code == 0 and {"torch", "deepspeed", "megatron.core"} <= found
    if not torch.__version__.startswith("2.11."):  # which imports sympy with its own sharded tensors
        assert not found & COMPILER
    assert len(found) < 3100, "2,900, of which PyTorch has 1,230 and DeepSpeed 410; 4,900 with the compiler"
    # Nor does it take torch to see that a run would continue with other settings.
    ((code, found),) = run_each(["train", str(path), "schedule.warmup_steps=0"])
    assert code == 2 and not found & HEAVY


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
