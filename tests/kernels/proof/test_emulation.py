"""Rounding is emulated only in Triton's interpreter; tests/kernels/interpreter/test_emulation.py has the numbers."""

import pytest

from amfm.kernels.proof.check import emulate_rounding
from amfm.kernels.runtime.backend import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="this process interprets")
def test_rounding_is_emulated_in_the_interpreter_only():
    with pytest.raises(RuntimeError, match="start Python with TRITON_INTERPRET=1"), emulate_rounding():
        pass
