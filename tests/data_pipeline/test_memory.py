"""What is kept after it was freed comes back without page faults."""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from amfm.data_pipeline.memory import OWN_SETTINGS, keep_freed_memory, no_garbage_collection

COUNT_FAULTS = """
import resource, sys
from amfm.data_pipeline.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [b"a" * (30 * 2**20) for _ in range(3)]  # numpy would ask for huge pages
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc's allocator is told anything")
def test_memory_that_is_kept_is_not_mapped_again():
    faults = {}
    for how in ("keep", "leave"):
        command = [sys.executable, "-c", COUNT_FAULTS, how]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["leave"] > 10_000, "90 MiB are 23,040 pages"
    assert faults["keep"] < 1_000


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_settings_of_the_environment_stay(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "0")
    assert not keep_freed_memory()


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_rests_inside_and_is_as_it_was_afterwards(is_on: bool):
    (gc.enable if is_on else gc.disable)()
    try:
        with no_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == is_on
        with pytest.raises(RuntimeError, match="stop"), no_garbage_collection():
            raise RuntimeError("stop")
        assert gc.isenabled() == is_on
    finally:
        gc.enable()
