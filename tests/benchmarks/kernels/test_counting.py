"""Counting outside the interpreter; what is counted inside it is tested in `interpreter/test_counting.py`."""

import pytest

from amfm.kernels.runtime.backend import INTERPRETED
from benchmarks.kernels.counting import count_launches


@pytest.mark.skipif(INTERPRETED, reason="this process interprets")
def test_counting_outside_the_interpreter_is_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), count_launches():
        pass
