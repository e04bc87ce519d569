"""Races outside the interpreter; what is found inside it is tested in `interpreter/test_races.py`."""

import pytest

from amfm.kernels.runtime.backend import INTERPRETED
from tests.kernels.watch.races import find_races


@pytest.mark.skipif(INTERPRETED, reason="this process interprets")
def test_finding_races_outside_the_interpreter_is_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), find_races():
        pass
