"""`amfm plan`: what its options need."""

import sys

import pytest

from amfm.launch.commands.plan import check_trace_options


def test_a_trace_without_triton_is_refused_with_what_to_install(monkeypatch):
    check_trace_options(True, False, None, None, None)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="need Triton, which is not installed; pip install triton"):
        check_trace_options(True, False, None, None, None)
