"""The first use of a kernel on a card, with Triton's interpreter as the card: checked once, and refused by name where wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.first_use import digest_source, look_up

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the check starts an interpreter of its own")

PLANTED = "tests.kernels.acceptance.planted"


def test_a_wrong_kernel_is_found_once_and_remembered_for_this_card_and_source(tmp_path: Path) -> None:
    faults = look_up("wrong", "cpu", "NVIDIA H100, torch 2.11", tmp_path, PLANTED)
    assert len(faults) == 1 and faults[0].startswith("the wrong one: d_x is off by")
    (kept,) = tmp_path.glob("*.json")
    assert "NVIDIA-H100" in kept.name and digest_source() in kept.name
    # What is kept is read, not found again; another card asks anew.
    kept.write_text(json.dumps({"faults": ["as kept"]}))
    assert look_up("wrong", "cpu", "NVIDIA H100, torch 2.11", tmp_path, PLANTED) == ["as kept"]


@pytest.mark.slow
def test_a_kernel_that_crashes_is_found_and_a_right_one_is_not(tmp_path: Path) -> None:
    (fault,) = look_up("crash", "cpu", "a card", tmp_path, PLANTED)
    assert fault.startswith("the crash one: the check ended with code -11")
    assert look_up("right", "cpu", "a card", None, PLANTED) == []


@pytest.mark.slow
def test_a_check_that_cannot_run_is_an_error_and_not_a_verdict(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"kernels of right could not be checked on this card.*no_such_module"):
        look_up("right", "cpu", "a card", tmp_path, "tests.no_such_module")
    assert not [*tmp_path.glob("*.json")]
