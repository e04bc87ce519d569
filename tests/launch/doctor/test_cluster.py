"""The doctor across ranks: what it compares, what it measures, and what it says where ranks or hosts differ."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from amfm.launch.cli import run
from amfm.launch.doctor.cluster import (
    StorageTest,
    compare_reports,
    examine_clocks,
    examine_cluster,
    examine_links,
    examine_storage,
    leave_cluster,
)
from amfm.launch.doctor.machine import Finding
from amfm.launch.doctor.rank import (
    CacheFolder,
    Link,
    RankReport,
    Skew,
    describe_rank,
    estimate_skew,
    examine_cache,
    measure_skews,
    plan_links,
)
from amfm.pretrain.config.file import resolved_yaml
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import tiny_config, tiny_data


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def examine_as_rank(folders: list[Path], wait_seconds: float) -> tuple[list[Finding], list[str], Skew, float]:
    from torch.distributed import get_rank

    from amfm.pretrain.parallel import start_process_group

    start_process_group(PATIENCE_SECONDS)
    words: list[str] = []
    findings = examine_cluster(folders[get_rank()], report=words.append, wait_seconds=wait_seconds)
    began = time.time()
    skew = measure_skews(["a", "b"])["b"]
    seconds = time.time() - began
    leave_cluster()
    return findings, words, skew, seconds


def test_two_ranks_of_this_machine_are_alike_and_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "not yet" / "run"
    (findings, words, skew, seconds), (others, silence, same_skew, _) = run_ranks(
        examine_as_rank, [folder, folder], PATIENCE_SECONDS
    )
    assert findings == others
    assert words[-1] == "amfm doctor: measuring links"
    assert silence == []
    assert [finding for finding in findings if finding.status == "fail"] == []
    found = by_name(findings)
    for name in ("python", "torch", "deepspeed", "megatron-core", "triton", "nccl", "amfm", "devices"):
        assert found[name].status == "ok", found[name]
    assert found["shared storage"].found.startswith(f"{folder}: seen by all after at most ")
    assert list(folder.iterdir()) == []
    assert found["clocks"] == Finding("clocks", "ok", "1 host(s) within 0.000 s (give or take 0.0000)")
    # As if they were two hosts: they have one clock, so what is measured must be within its own error of 0.
    assert skew == same_skew
    assert abs(skew.seconds) <= skew.error <= seconds
    for name in ("all-reduce", "links within hosts"):
        # Memory of one machine: below any memory, and as slow as other work makes it.
        rate = float(found[name].found.split(" GB/s")[0].split()[-1])
        assert 0 <= rate < 500, found[name]


def test_a_folder_that_each_host_has_for_itself_fails_by_rank(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    folders[1].mkdir()
    (findings, *_), (others, *_) = run_ranks(examine_as_rank, folders, 0.2)
    finding = by_name(findings)["shared storage"]
    assert finding.status == "fail"
    assert f"what rank 0 writes is not seen by {socket.gethostname()} (rank 1): No such file" in finding.found
    assert "run.dir, or --shared DIR" in finding.remedy
    assert by_name(others)["shared storage"].status == "fail"
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def run_and_keep(words: list[str]) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        code = run(words)
    return code, out.getvalue(), errors.getvalue()


def test_a_failure_ends_with_code_3_and_one_object_for_scripts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["doctor", "--cluster", "--json", "--shared", str(tmp_path / "file/run")]
    # One rank of one, in a separate process: it leaves its group at the end.
    ((code, out, errors),) = run_ranks(run_and_keep, words, num_ranks=1)
    assert code == 3, errors
    report = json.loads(out)
    (failed,) = [finding for finding in report["findings"] if finding["status"] == "fail"]
    assert report["ok"] is False
    assert failed["found"].endswith(f"cannot be written by {socket.gethostname()} (rank 0): Not a directory")
    assert "1 thing(s) that amfm needs are missing or wrong" in errors


def test_each_way_in_which_storage_fails_has_its_line() -> None:
    hosts = ["a", "a", "b", "b"]
    unwritten = examine_storage(Path("run"), StorageTest({2: "Permission denied"}, {}, {}, 0.1, 9.0), hosts)
    assert unwritten.found == "run: cannot be written by b (rank 2): Permission denied"
    unseen = examine_storage(Path("run"), StorageTest({}, {}, {2: "other bytes", 3: "other bytes"}, 0.1, 9.0), hosts)
    assert unseen.found == "run: rank 0 does not see what is written by b (ranks 2, 3): other bytes"
    assert examine_storage(Path("run"), StorageTest({}, {}, {}, 0.1, 0.5), hosts).status == "warn"


@pytest.fixture(scope="module")
def reports() -> list[RankReport]:
    """Four ranks on two hosts that are as this process is."""
    own = dataclasses.replace(describe_rank(0), cache=CacheFolder("/home/me/.triton/cache", "ext4", None), findings=())
    return [dataclasses.replace(own, rank=rank, host="ab"[rank // 2]) for rank in range(4)]


def test_another_version_is_named_with_rank_and_host(reports: list[RankReport]) -> None:
    assert {finding.status for finding in compare_reports(reports)} == {"ok"}
    usual = reports[0].versions["torch"]
    odd = dataclasses.replace(reports[2], versions={**reports[2].versions, "torch": "2.1.0", "python": "3.11.0"})
    found = by_name(compare_reports([*reports[:2], odd, reports[3]]))
    assert (found["torch"].status, found["python"].status) == ("fail", "warn")
    assert found["torch"].found == f"{usual} on 3 of 4 ranks; 2.1.0 on b (rank 2)"
    assert "one environment" in found["torch"].remedy


def test_devices_cards_caches_and_disks_are_compared(reports: list[RankReport]) -> None:
    first, second, third, fourth = reports
    other = dataclasses.replace(fourth, device="H200, 141 GiB")
    assert by_name(compare_reports([first, second, third, other]))["devices"].status == "warn"
    gpus = [dataclasses.replace(item, device_id=gpu) for item, gpu in zip(reports, "wxyy")]
    every = "a: rank 0 w, rank 1 x, b: rank 2 y, rank 3 y"
    shared = by_name(compare_reports(gpus))["cards"]
    assert (shared.status, shared.found) == ("fail", f"one GPU for several ranks: b (ranks 2, 3); {every}")
    own = [dataclasses.replace(item, device_id=gpu) for item, gpu in zip(reports, "wxyz")]
    found = by_name(compare_reports(own))["cards"]
    assert (found.status, found.found) == ("ok", f"one for each rank; {every[:-1]}z")
    remote = dataclasses.replace(third, cache=CacheFolder("/home/me/.triton/cache", "nfs4", None))
    found = by_name(compare_reports([first, second, remote, fourth]))["triton cache"]
    assert (found.status, found.found) == ("warn", "b: /home/me/.triton/cache on nfs4")
    broken = dataclasses.replace(third, cache=CacheFolder("/c", "ext4", "/c: Permission denied"), device_id="y")
    assert by_name(compare_reports([first, second, broken, fourth]))["triton cache"].status == "fail"
    full = dataclasses.replace(third, free_gib={"temporary files": 0.25})
    found = by_name(compare_reports([first, second, full, fourth]))["disk"]
    assert (found.status, found.found) == ("warn", "b: 0.2 GiB for temporary files")


def test_what_hosts_find_amiss_of_themselves_is_one_line_for_all_alike(reports: list[RankReport]) -> None:
    amiss = Finding("zarr", "warn", "3.0, outside >=3.1", "pip install zarr")
    findings = compare_reports([dataclasses.replace(item, findings=(amiss,)) for item in reports])
    assert by_name(findings)["zarr"] == Finding("zarr", "warn", "a, b: 3.0, outside >=3.1", "pip install zarr")


def test_a_cache_is_on_the_network_by_its_file_system(tmp_path: Path) -> None:
    assert [CacheFolder("x", kind, None).is_on_network() for kind in ("fuse.sshfs", "fuse.fuse-overlayfs", "xfs")] == [
        True,
        False,
        False,
    ]
    cache = examine_cache(tmp_path / "a" / "b")
    assert cache.problem is None
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("sizes", [[1], [2], [1, 1], [3], [4, 4], [5, 5, 5], [3, 1, 2], [1] * 7])
def test_rounds_use_every_ring_link_once_and_nobody_twice_at_a_time(sizes: list[int]) -> None:
    hosts = [f"host-{number}" for number, size in enumerate(sizes) for _ in range(size)]
    links: list[frozenset[int]] = []
    for kind, pairs in plan_links(hosts):
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
        assert {hosts[first] == hosts[second] for first, second in pairs} == {kind == "within hosts"}
        links += [frozenset(pair) for pair in pairs]
    assert len(links) == len(set(links))
    across = [sum(size > place for size in sizes) for place in range(max(sizes))]
    assert len(links) == sum(size if size > 2 else size - 1 for size in (*sizes, *across))


def test_links_far_below_the_median_of_their_kind_are_named() -> None:
    hosts = ["a", "a", "b", "b", "c", "c"]
    rates = {(0, 1): 100.0, (2, 3): 99.0, (4, 5): 98.0}
    within = [Link(*pair, "within hosts", rate) for pair, rate in rates.items()]
    rates = {(0, 2): 40.0, (2, 4): 41.0, (4, 0): 39.0, (1, 3): 38.0, (3, 5): 11.0, (5, 1): 12.0}
    between = [Link(*pair, "between hosts", rate) for pair, rate in rates.items()]
    first, second = examine_links([*within, *between], hosts)
    assert (first.status, first.name) == ("ok", "links within hosts")
    assert second.status == "warn"
    assert "11.00 GB/s between b (rank 3) and c (rank 5), 12.00 GB/s between c (rank 5) and a (rank 1)" in second.found
    assert "38.00" not in second.found


def test_the_quickest_message_gives_the_skew_and_its_error() -> None:
    # The other clock is 3 s ahead; one way takes 10 ms, the other 30, and a second message much longer.
    skew = estimate_skew([(100.0, 103.500, 100.9), (200.0, 203.010, 200.040)])
    assert skew.seconds == pytest.approx(2.99)
    assert skew.error == pytest.approx(0.02)
    assert abs(skew.seconds - 3.0) <= skew.error


def test_a_clock_off_the_middle_of_the_hosts_warns_also_when_it_is_rank_0s() -> None:
    fine = examine_clocks({"a": Skew(0.0, 0.0), "b": Skew(0.2, 0.001), "c": Skew(-0.1, 0.001)})
    assert (fine.status, fine.found) == ("ok", "3 host(s) within 0.200 s (give or take 0.0010)")
    late = examine_clocks({"a": Skew(0.0, 0.0), "b": Skew(5.0, 0.001), "c": Skew(5.1, 0.001)})
    assert late.status == "warn"
    assert late.found == "off the middle of the hosts: a: -5.000 s (give or take 0.000)"
    assert examine_clocks({"a": Skew(0.0, 0.0), "b": Skew(0.1, 1.5)}).status == "warn"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shared", "runs"], "--shared runs belongs to --cluster"),
        (["--nproc", "2"], "--nproc 2 belongs to --cluster"),
        (["--cluster"], "--cluster compares ranks, and this process is not a rank; add --nproc 2"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert run(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["torchrun", "slurm", "ray"])
def test_launchers_start_the_doctor_where_the_run_would_be(
    launcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run")
    path = tmp_path / "run.yaml"
    path.write_text(resolved_yaml(config))
    arguments = ["launch", str(path), "--on", launcher, "--nodes", "2", "--nproc-per-node", "1", "--doctor"]
    assert run([*arguments, "--dry-run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    if launcher == "slurm":
        # The batch script calls the launcher again, which then is inside the allocation.
        assert lines[-1] == ["exec", sys.executable, "-P", "-m", "amfm.launch", *arguments]
        return
    doctor = ["-m", "amfm.launch", "doctor", "--cluster", "--shared", str(tmp_path / "run")]
    assert lines[-1][-6:] == doctor
    if launcher == "torchrun":
        assert [line[-6:] for line in lines] == [doctor, doctor]
        assert all("--max-restarts=0" in line for line in lines)
