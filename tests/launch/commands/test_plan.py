"""`amfm plan`: what its options need."""

import sys

import pytest

from amfm.launch.cli import run
from amfm.launch.commands.plan import check_trace_options


def test_a_trace_without_triton_is_refused_with_what_to_install(monkeypatch):
    check_trace_options(True, False, None, None, None)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="need Triton, which is not installed; pip install triton"):
        check_trace_options(True, False, None, None, None)


def test_reasons_without_a_search_are_refused(capsys):
    assert run(["plan", "--preset", "tiny_cpu", "--gpus", "1", "--why"]) == 2
    assert "--why has no effect without --search" in capsys.readouterr().err
