"""A node shows before an attempt what it is fit for; who is not fit is left out, and remembered."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from amfm.launch.cluster import node_check
from amfm.launch.cluster.left_out import LeftOut
from amfm.launch.cluster.node_check import (
    LINK_SECONDS,
    blame_links,
    check_code,
    check_link,
    check_node,
    main,
    make_request,
    process_age,
    read_answers,
)
from tests.helpers.patience import PATIENCE_SECONDS


def request(run_dir: Path, **changes: Any) -> dict[str, Any]:
    return make_request(run_dir, 1, loads_anew=True) | {"link": {}} | changes


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
    (unreached,) = check_link({"connect": ["127.0.0.1", 1]}, 0.3)
    assert "it does not reach 127.0.0.1 (port 1): " in unreached


def test_a_clock_is_compared_as_of_the_start_of_a_process_that_loads_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    age = process_age()
    monkeypatch.setattr(node_check, "CLOCK_SECONDS", age / 2)
    main(json.dumps(request(tmp_path, time=time.time() - age)))
    assert [answer["faults"] for answer in read_answers(capsys.readouterr().out)] == [[]]


def test_nodes_come_to_the_first_one(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = threading.Thread(target=lambda: list(check_link({"expect": 2}, LINK_SECONDS)))
    waiting.start()
    said = ""
    while "listening" not in said:
        said += capsys.readouterr().out
        time.sleep(0.01)
    port = int(said.rpartition(" ")[2].strip("}\n"))
    assert [list(check_link({"connect": ["127.0.0.1", port]}, LINK_SECONDS)) for _ in range(2)] == [[], []]
    waiting.join(timeout=PATIENCE_SECONDS)
    assert not waiting.is_alive()


def test_one_that_no_other_reaches_is_at_fault_itself() -> None:
    unreached = "it does not reach a (port 1): no answer"
    assert blame_links({"a": [], "b": [unreached], "c": [unreached, "x"]}, "a") == {
        "a": ["none of 2 others reaches it"],
        "b": [],
        "c": ["x"],
    }
    assert blame_links({"a": [], "b": [unreached]}, "a") == {"a": [], "b": [unreached]}


def test_a_node_that_failed_or_was_lost_twice_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = LeftOut(tmp_path)
    left.lose("node3")
    assert LeftOut(tmp_path).reasons == {}
    left.lose("node3")
    left.leave_out("node5", "its clock is 300 s behind; set it (NTP)")
    assert LeftOut(tmp_path).reasons == {
        "node3": "it was lost 2 times",
        "node5": "its clock is 300 s behind; set it (NTP)",
    }
    assert "node5 is left out, as before: its clock" in capsys.readouterr().err
    left.path.write_text("[]")
    with pytest.raises(ValueError, match="is not what amfm wrote"):
        LeftOut(tmp_path)
