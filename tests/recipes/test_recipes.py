"""The recipes: each parses, rejects what it cannot do, and runs whole at toy size on a CPU; called again it
continues.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.examples import install_example

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted(path.name for path in RECIPES.glob("*.sh"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An `amfm` of this checkout on the path, whatever is installed."""
    shim = tmp_path / "bin" / "amfm"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m amfm.launch "$@"\n')
    shim.chmod(0o755)
    path = os.pathsep.join([str(shim.parent), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([str(RECIPES.parent), os.environ["PYTHONPATH"]]),  # with packages
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "2",  # as users do: a process that has computed with several threads cannot be forked
    }


def play(script: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(RECIPES / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_parses_and_says_how_it_is_used(script: str, environment: dict[str, str]) -> None:
    assert subprocess.run(["bash", "-n", str(RECIPES / script)], check=False).returncode == 0
    assert os.access(RECIPES / script, os.X_OK)
    done = play(script, environment=environment)
    assert done.returncode != 0 and f"usage: recipes/{script}" in done.stderr


def test_a_budget_that_is_none_is_refused(tmp_path: Path, environment: dict[str, str]) -> None:
    done = play("one_node_8gpu.sh", str(tmp_path / "work"), "huge", environment=environment)
    assert done.returncode == 2 and "must be 150m, 1b, 8b or --toy" in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "times"), [("one_gpu.sh", 2), ("one_node_8gpu.sh", 1)])
def test_from_text_to_an_export_and_again(tmp_path: Path, script: str, times: int, environment: dict[str, str]) -> None:
    work = tmp_path / "work"
    for _ in range(times):
        done = play(script, str(work), "--toy", environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    run = work / "runs" / "nemotron_20m"
    assert (run / "checkpoints" / "step-00000004").is_dir()
    for made in (run / "report.html", run / "curves.svg", work / "export" / "model.safetensors"):
        assert made.is_file(), made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kept"),
    [
        (
            "granite4",
            {"architectures": ["GraniteMoeHybridForCausalLM"], "logits_scaling": 6.0, "embedding_multiplier": 12.0},
        ),
        (
            "nemotron3",
            {"architectures": ["NemotronHForCausalLM"], "moe_latent_size": 48, "routed_scaling_factor": 2.5},
        ),
    ],
)
def test_a_released_hybrid_trains_on_and_comes_out_as_its_class(
    tmp_path: Path, environment: dict[str, str], family: str, kept: dict[str, Any]
) -> None:
    command = "continue_released.sh", str(tmp_path / "work"), "--toy", family
    first, again = (play(*command, environment=environment) for _ in range(2))
    for done in (first, again):
        assert done.returncode == 0, done.stdout + done.stderr
    assert "largest logit difference" in first.stdout and "finished at step 20 of 20" in first.stderr
    lines = [json.loads(line) for line in (tmp_path / "work" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    config = json.loads((tmp_path / "work" / "export" / "config.json").read_text())
    assert {name: config[name] for name in kept} == kept


@pytest.mark.slow
def test_an_ablation_of_two_cells(tmp_path: Path, environment: dict[str, str]) -> None:
    packages = install_example("study", tmp_path / "packages")
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, packages), environment["PYTHONPATH"]])
    done = play("ablate_mixers.sh", str(tmp_path / "work"), "--toy", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "work" / "study" / "study.png").is_file()
    assert "Mamba2" in (tmp_path / "work" / "study" / "study.md").read_text()


@pytest.mark.slow
def test_without_a_network_a_budget_ends_with_one_message(tmp_path: Path, environment: dict[str, str]) -> None:
    closed = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = play("one_gpu.sh", str(tmp_path / "work"), "20m", environment=closed)
    assert done.returncode == 2
    assert "hub:HuggingFaceFW/fineweb-edu/sample-10BT cannot be looked up" in done.stderr
    source = yaml.safe_load((tmp_path / "work" / "run.yaml").read_text())["data"]["sources"][0]
    assert source["name"] == "fineweb-edu" and source["max_tokens"] >= 10**8


@pytest.mark.slow
def test_a_softmax_model_is_converted_and_again(tmp_path: Path, environment: dict[str, str]) -> None:
    work = tmp_path / "work"
    for _ in range(2):
        done = play("convert_softmax.sh", str(work), "--toy", environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "window alone, tuned alike" in done.stdout and "verdict" in done.stdout
    report = json.loads((work / "runs" / "softmax_converted" / "result" / "conversion.json").read_text())
    assert report["converted_blocks"] == [0, 2, 6]


@pytest.mark.slow
def test_a_model_is_pruned_and_distilled_and_again(tmp_path: Path, environment: dict[str, str]) -> None:
    for _ in range(2):
        done = play("prune_and_distil.sh", str(tmp_path / "work"), "--toy", environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split() for line in done.stdout.splitlines()[-4:]]
    assert [line[0] for line in table] == ["teacher", "scratch", "pruned", "distilled"]
    assert all(0 < float(line[1]) < 10 for line in table) and all(len(line) == 3 for line in table[1:])
