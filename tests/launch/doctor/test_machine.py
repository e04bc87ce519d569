"""The doctor: a finding for everything amfm needs, a fix wherever something is amiss."""

import importlib.metadata
import json

import pytest

from amfm.launch.cli import run
from amfm.launch.doctor import machine as doctor


def test_this_machine_is_described_as_one_object(capsys):
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {finding["name"] for finding in report["findings"]}
    assert report["ok"] is True
    assert {
        "python",
        "torch",
        "deepspeed",
        "megatron-core",
        "ray",
        "zarr",
        "transformers",
        "cores",
        "memory",
        "disk",
    } <= names
    assert {"triton kernels", "C++ compiler"} <= names


def test_the_table_goes_to_standard_output(capsys):
    assert run(["doctor"]) == 0
    assert "This machine" in capsys.readouterr().out


def test_every_warning_and_failure_has_a_remedy():
    assert [item for item in doctor.examine_machine() if item.status != "ok" and not item.remedy] == []


def pretend_versions(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Let some distributions look absent or of another version."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_missing_package_fails_with_the_command_that_installs_it(monkeypatch, capsys):
    pretend_versions(monkeypatch, {"zarr": None})
    assert run(["doctor", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    (finding,) = [item for item in report["findings"] if item["status"] == "fail"]
    assert finding == {"name": "zarr", "status": "fail", "found": "not installed", "remedy": 'pip install "zarr>=3.1"'}


def test_a_version_outside_the_range_warns(monkeypatch):
    pretend_versions(monkeypatch, {"deepspeed": "0.21.0"})
    (finding,) = [item for item in doctor.examine_packages() if item.name == "deepspeed"]
    assert finding.status == "warn"
    assert finding.found.startswith("0.21.0, outside ")


def test_known_bad_combinations_warn(monkeypatch):
    pretend_versions(monkeypatch, {"kernels": "0.10.0", "transformers": "5.20.0"})
    first, second = doctor.examine_known_bad()
    assert "Hugging Face distribution `kernels` 0.10.0" in first.found
    assert first.remedy == "pip uninstall kernels"
    assert second.remedy == 'pip install "transformers>=5.24"'


def test_python_outside_the_range_fails(monkeypatch):
    monkeypatch.setattr("sys.version_info", (3, 14, 0))
    assert doctor.examine_python().status == "fail"
