"""`python -m benchmarks.many_actors`: what it counts is what was handed out; speeds are not judged."""

from pathlib import Path

import pytest

from benchmarks.many_actors import Cluster, _make_units, _report_of, estimate, simulate


def test_an_estimate_is_in_proportion_to_the_parts() -> None:
    piece = {"cpu_microseconds": 1000.0, "microseconds": 2000.0, "bytes": 2**20}
    names = ("plan", "calls and journal", "journal, read again", "manifest, written", "manifest, opened")
    found = {"pieces": dict.fromkeys(names, piece), "journal_microseconds": 5000.0, "manifest_bytes": 2**20}
    cluster = Cluster(tokens=1e9, bytes_per_token=4.0, nodes=2, cores=10, core_bytes_per_second=1e6)
    rows = {bound: (needed, there) for bound, needed, there in estimate(found, cluster, 40_000_000)}
    assert rows["duration"] == ("0.1 h", "20 actors"), "4 GB at 20 MB/s"
    assert rows["parts per second, journal with its fsync"] == ("0", "200")
    assert rows["bytes of the manifest"][0] == "200 MiB", "100 units, a part of each split"
    assert rows["memory of the driver"][0] == "0.2 GiB" and rows["plan, CPU"][0] == "0 s"


def test_a_seat_reports_a_unit_as_an_actor_would() -> None:
    units = _make_units(5, 64_000_000)
    assert [unit.number for unit in units] == [0, 1, 2, 3, 4]
    assert all(unit.text_bytes <= 64_000_000 and len(unit.segments) <= 32 for unit in units)
    report = _report_of(units[3], 1.0)
    assert [part.path for of_split in report.parts.values() for part in of_split] == [
        "parts/web/train-000003-00.zarr",
        "parts/web/validation-000003-00.zarr",
    ]
    assert report.text_bytes == report.covered_bytes == units[3].text_bytes


@pytest.mark.slow
def test_every_unit_is_handed_out_journalled_and_named_by_the_manifest(tmp_path: Path) -> None:
    found = simulate(20, 2, 60, 0.1, tmp_path / "work", 64_000_000)  # it checks the journal and the manifest itself
    assert found["parts"] == 60 and 400 < found["manifest_bytes"] < 512 and 0 < found["busy"] <= 1
