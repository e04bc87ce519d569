"""A node shows before an attempt what it is fit for; who is not fit is excluded, also from later launches."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from amfm.launch.cluster import node_check
from amfm.launch.cluster.links import LINK_SECONDS, blame_links, candidates, listen
from amfm.launch.cluster.node_check import (
    ExcludedNodes,
    blame,
    check_code,
    check_links,
    check_node,
    main,
    make_request,
    process_age,
    read_answers,
)
from amfm.launch.cluster.storage import list_inputs
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.tiny_run import tiny_config, tiny_data


def request(run_dir: Path, **changes: Any) -> dict[str, Any]:
    return make_request(run_dir, 1, reloads=True) | {"link": {}} | changes


def test_a_node_like_the_launcher_s_passes_and_leaves_nothing(tmp_path: Path) -> None:
    assert check_node(request(tmp_path), time.time()) == []
    assert [path.name for path in (tmp_path / "launch").iterdir()] == ["check-token"]


def test_each_thing_that_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_check, "STORAGE_SECONDS", 0.0)
    asked = request(tmp_path, token="newer yet")
    faults = check_node(asked, asked["time"] - 300)
    assert "its clock is 300 s behind" in faults[0]
    assert "sees an old file: another or a stale mount" in faults[1]
    assert next(iter(check_code(asked["code"] | {"torch": "1.0"}))).endswith(
        "the launcher has 1.0; install the same on every node"
    )
    assert "GiB of memory are free for 100000 ranks" in next(iter(node_check.check_memory(100_000)))
    (unreached,) = check_links({"connect": ["127.0.0.1", [1]]}, "token", 0.3)
    assert "it does not reach 127.0.0.1 (port 1): " in unreached


def test_a_clock_is_compared_as_of_the_start_of_a_process_that_loads_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    age = process_age()
    monkeypatch.setattr(node_check, "CLOCK_SECONDS", age / 2)
    main(json.dumps(request(tmp_path, time=time.time() - age)))
    assert [answer["faults"] for answer in read_answers(capsys.readouterr().out)] == [[]]


def test_a_node_without_the_launcher_s_store_has_a_fault_and_where_all_lack_it_the_setting_has(tmp_path: Path) -> None:
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run")
    inputs = list_inputs(config)
    (manifest,) = map(Path, inputs)
    assert check_node(request(tmp_path, inputs=inputs), time.time()) == []
    manifest.write_text("{}")
    other = check_node(request(tmp_path, inputs=inputs), time.time())
    manifest.unlink()
    absent = check_node(request(tmp_path, inputs=inputs), time.time())
    assert "but another one; mount the shared storage again" in other[0]
    assert absent == [f"it does not see the launcher's {manifest}: No such file or directory; mount its storage there"]
    assert blame({"node1": [], "node2": absent}, "node1", tmp_path)["node2"] == absent
    assert blame({"node1": absent}, "node1", tmp_path)["node1"] == absent, "one node says nothing of the setting"
    with pytest.raises(ValueError, match=r"none of 2 nodes sees the launcher's files"):
        blame({"node1": other, "node2": absent}, "node1", tmp_path)


def test_a_node_without_a_folder_of_plugins_has_a_fault_with_its_name(tmp_path: Path) -> None:
    parts = tmp_path / "my_parts"
    (parts / "deep").mkdir(parents=True)
    for name in ("__init__.py", "deep/mixer.py"):
        (parts / name).write_text("")
    config = tiny_config(tiny_data(tmp_path / "data"), tmp_path / "run").model_copy(update={"plugins": (str(parts),)})
    inputs = list_inputs(config)
    assert len(inputs) == 3 and check_node(request(tmp_path, inputs=inputs), time.time()) == []
    (parts / "deep" / "mixer.py").unlink()
    (absent,) = check_node(request(tmp_path, inputs=inputs), time.time())
    assert "does not see the launcher's" in absent and "my_parts/deep/mixer.py" in absent


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_nodes_come_to_the_first_one(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    waiting = threading.Thread(target=lambda: list(check_links({"expect": 2}, "token", LINK_SECONDS)))
    waiting.start()
    said = ""
    while "listening" not in said:
        said += capsys.readouterr().out
        time.sleep(0.01)
    port = int(said.rpartition(" ")[2].strip("}\n"))
    assert [list(check_links({"connect": [host, [port]]}, "token", LINK_SECONDS)) for _ in range(2)] == [[], []]
    waiting.join(timeout=PATIENCE_SECONDS)
    assert not waiting.is_alive()


def answer_once(listener: socket.socket, words: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(words)


def test_a_port_that_another_job_has_is_passed_over_by_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs on one node: what listens there may accept, and say nothing or something else."""
    ports = candidates("check of 7")
    assert not set(ports) & set(candidates("check of 8"))
    with listen(ports[0]) as taken, listen(ports[1]) as other:
        for listener, words in ((taken, b""), (other, b"theirs")):
            threading.Thread(target=answer_once, args=(listener, words), daemon=True).start()
        links = {"ports": ports, "expect": 1}
        waiting = threading.Thread(target=lambda: list(check_links(links, "token", LINK_SECONDS)))
        waiting.start()
        assert list(check_links({"connect": ["127.0.0.1", ports]}, "token", LINK_SECONDS)) == []
        waiting.join(timeout=PATIENCE_SECONDS)
    assert f'"listening": {ports[2]}' in capsys.readouterr().out


def test_a_full_disk_is_named_and_keeps_no_part_of_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(tmp_path)

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    assert any("No space left on device" in fault for fault in node_check.check_storage(tmp_path, asked["token"]))
    assert [path.name for path in (tmp_path / "launch").iterdir()] == ["check-token"]


def test_one_that_no_other_reaches_is_at_fault_itself() -> None:
    unreached = "it does not reach a (port 1): no answer"
    assert blame_links({"a": [], "b": [unreached], "c": [unreached, "x"]}, "a") == {
        "a": ["none of 2 others reaches it"],
        "b": [],
        "c": ["x"],
    }
    assert blame_links({"a": [], "b": [unreached]}, "a") == {"a": [], "b": [unreached]}


def test_a_node_that_failed_or_was_lost_twice_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = ExcludedNodes(tmp_path)
    left.lose("node3")
    assert ExcludedNodes(tmp_path).reasons == {}
    left.lose("node3")
    left.exclude("node5", "its clock is 300 s behind; set it (NTP)")
    assert ExcludedNodes(tmp_path).reasons == {
        "node3": "it was lost 2 times",
        "node5": "its clock is 300 s behind; set it (NTP)",
    }
    assert "node5 is excluded, as before: its clock" in capsys.readouterr().err
    (tmp_path / "launch/left_out.json").write_text('{"left_out": {"node1": "old"}, "losses": {}}')
    assert "node1" not in ExcludedNodes(tmp_path).reasons
    left.path.unlink()
    assert ExcludedNodes(tmp_path).reasons == {"node1": "old"}, "a file of before is read"
    left.path.write_text("[]")
    with pytest.raises(ValueError, match="is not what amfm wrote"):
        ExcludedNodes(tmp_path)
