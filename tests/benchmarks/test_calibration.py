"""A hardware file from steps of this machine: the fit against times that are known, and the file that is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amfm.launch.plan.hardware import HARDWARE, load_hardware
from amfm.model.config.core_options import FeedForwardConfig
from benchmarks.calibration.__main__ import calibration
from benchmarks.calibration.fit import (
    SECTIONS,
    Check,
    find_valley,
    fit,
    granite_shape,
    planned_seconds,
    run_config,
    write_hardware,
)
from benchmarks.command import run

ROOT = Path(__file__).parents[2]
KNOWN = {
    "product_efficiency": 0.61,
    "grouped_efficiency": 0.23,
    "attention_efficiency": 0.07,
    "memory_efficiency": 0.42,
}


def small_runs():
    shape = granite_shape().model_copy(update={"feed_forward": FeedForwardConfig(hidden_size=1024)})
    patterns = ("----", "EEEE", "MMMM", "****", shape.pattern)
    runs = [run_config(shape.model_copy(update={"pattern": pattern}), "float32", 4) for pattern in patterns]
    return [*runs, run_config(shape, "float32", 1, 64)]  # weights take its time, which tells memory from products


def test_a_fit_finds_efficiencies_that_explain_the_times_of_a_machine():
    # Slow arithmetic, so that products and not passes over memory bind, as on a CPU.
    peaks = HARDWARE["a100"].model_copy(update={"float32_flops": 1e11, "memory_bytes_per_second": 2e10})
    real = peaks.model_copy(update=KNOWN)
    runs = small_runs()
    found = fit(peaks, [(config, planned_seconds(config, real), 1) for config in runs])
    for config in runs:
        assert planned_seconds(config, found) == pytest.approx(planned_seconds(config, real), rel=1e-3)
    for field, value in KNOWN.items():
        assert getattr(found, field) == pytest.approx(value, rel=1e-2), field


@pytest.mark.parametrize("place", [0.0, 0.013, 0.3, 0.71, 1.0])
def test_a_valley_is_found_with_one_look_a_section(place):
    looks = []

    def loss(x):
        looks.append(x)
        return abs(x - place)

    assert find_valley(loss) == pytest.approx(place, abs=1e-4)
    assert len(looks) == SECTIONS + 2


def test_what_no_efficiency_explains_ends_at_the_peak():
    peaks, (config, *_) = HARDWARE["a100"], small_runs()
    found = fit(peaks, [(config, planned_seconds(config, peaks) / 100, 1)])
    assert found.product_efficiency == found.memory_efficiency == 1.0


def test_the_file_is_one_that_the_plan_reads(tmp_path):
    path = tmp_path / "own.yaml"
    hardware = HARDWARE["h100"].model_copy(update={"name": 'GPU "7": 80 GB', **KNOWN})
    write_hardware(hardware, [Check("a step", 1.1, 1.0)], path)
    assert "# a step: planned 1.100 s, measured 1.000 s (+10%)" in path.read_text(encoding="utf-8")
    read = load_hardware(str(path))
    assert read.name == hardware.name
    for field, value in hardware.model_dump().items():
        if isinstance(value, float):
            assert getattr(read, field) == pytest.approx(value, rel=1e-4), field


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own.txt"], "own.txt must end in .yaml and be in a folder that exists; use hardware.yaml"),
        (["nowhere/own.yaml"], "must end in .yaml and be in a folder that exists"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_timed(arguments, message, capsys):
    assert run(calibration, arguments) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert "measuring" not in captured


@pytest.mark.slow
def test_a_calibrated_plan_knows_the_step_that_was_measured(tmp_path):
    path = tmp_path / "own.yaml"
    command = [sys.executable, "-m", "benchmarks.calibration", str(path)]
    done = subprocess.run(
        [*command, "--rounds", "3", "--threads", "1", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    found = json.loads(done.stdout)
    fitted = found["checks"][0]
    # On a quiet machine within some per cent (docs/benchmarks/planning.md); here others may take its cores while it measures.
    assert fitted["planned_seconds"] == pytest.approx(fitted["measured_seconds"], rel=0.35)
    assert load_hardware(str(path)).name == found["hardware"]["name"]
