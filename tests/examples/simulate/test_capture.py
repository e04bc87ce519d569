"""What of two steps a graph could not replay: reads of the host, other scalars, sizes and addresses, other launches."""

import torch
from amfm_simulate.capture import CaptureCheck


def note(check: CaptureCheck, documents: int, longest: int, launches: int, memory: str = "") -> None:
    check.begin_step()
    offsets = torch.empty(documents + 1, dtype=torch.int32)
    for _ in range(2):
        check.launch("*", "forward", "attend", (offsets, longest, 0.5), torch.empty(4, 8), lambda tensor: "")
    for _ in range(launches):
        check.launch("M", "backward", "walk", ((4, 2), torch.empty(3), 64), (), lambda tensor: memory)


def test_what_differs_between_two_steps_is_named_once_with_its_kernel() -> None:
    check = CaptureCheck()
    check.read("*", "forward", "before the first step")
    note(check, 5, 26, 2)
    note(check, 3, 43, 2)
    check.read("E", "forward", "model/moe.py:1 count")
    check.begin_step()
    check.read("M", "backward", "after the last step")
    found = check.found()
    changed = ["attend: int32[6], 26 -> int32[4], 43"]
    assert found["*"] == {"forward": {"launches": 2, "host_reads": [], "changed": changed}}
    assert found["M"] == {"backward": {"launches": 2, "host_reads": [], "changed": []}}
    assert found["E"] == {"forward": {"launches": 0, "host_reads": ["model/moe.py:1 count"], "changed": []}}


def test_more_or_fewer_launches_are_a_change() -> None:
    for numbers, said in (((2, 3), "nothing -> walk"), ((3, 2), "3 launches -> 2")):
        check = CaptureCheck()
        for number in numbers:
            note(check, 3, 43, number)
        assert check.found()["M"]["backward"]["changed"] == [said]


def test_other_memory_is_a_change() -> None:
    check = CaptureCheck()
    for memory in (" in memory 7+0 of x.py:1 f", " in memory 9+0 of x.py:1 f"):
        note(check, 3, 43, 1, memory)
    changed = ["walk: other memory of x.py:1 f"]
    assert check.found()["M"]["backward"]["changed"] == changed
