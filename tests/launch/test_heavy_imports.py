"""Imports without rounds of the garbage collector, which continues afterwards."""

import gc

import pytest

from amfm.launch.heavy_imports import heavy_imports


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_rests_inside_and_is_as_it_was_afterwards(is_on):
    (gc.enable if is_on else gc.disable)()
    try:
        with heavy_imports():
            assert not gc.isenabled()
        assert gc.isenabled() == is_on
        with pytest.raises(RuntimeError, match="stop"), heavy_imports():
            raise RuntimeError("stop")
        assert gc.isenabled() == is_on
    finally:
        gc.enable()
