"""Which FlashAttention runs, if none, one that is broken, or none for the GPU is installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from amfm.kernels.acceptance.child import describe_presence
from amfm.kernels.attention import varlen as flash
from amfm.kernels.attention.varlen import activate_newest, active, largest_head

if flash._activate is None:
    pytest.skip(f"torch {torch.__version__} cannot hand over", allow_module_level=True)


def test_torchs_own_runs_where_there_is_no_newer_one() -> None:
    assert activate_newest(8) == ("FA2", "there is no newer one for compute capability 8")
    assert activate_newest(9) == ("FA2", "FA3 is not installed (module flash_attn_interface)")
    assert active() is None and largest_head() == 256


def test_a_package_without_kernels_is_not_used_and_its_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself looks for the kernels in it."""
    (tmp_path / "flash_attn_interface.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    name, reason = activate_newest(9)
    sys.modules.pop("flash_attn_interface", None)
    assert name == "FA2" and "installed and cannot be used" in reason and "does not expose FA3" in reason
    assert active() is None


def test_the_acceptance_says_in_one_line_which_attention_and_whether_fp8_there_is() -> None:
    hopper, ampere = describe_presence(90), describe_presence(80)
    assert hopper == {"flash_attention": "FA2 (FA3 is not installed (module flash_attn_interface))", "fp8": "yes"}
    assert ampere["fp8"] == "no" and active() is None
