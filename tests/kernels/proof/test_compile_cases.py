"""Every kernel of feed-forward, attention, positions and loss compiles for the cards it is meant for."""

import pytest

from kernels.backend import INTERPRETED
from kernels.proof.ahead_of_time import compile_ahead
from kernels.proof.compile_cases import compile_cases

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

CASES = {case.name: case for case in compile_cases()}

# Bytes of spills a thread on sm_90 and why; everything else has none.
SPILLS = {
    # Value, two hidden tiles and their gradients at once; a tile of half the height would halve the product's reuse.
    "experts down backward, SwiGLU, 1024 rows an expert": 16,
}


def check(name, architecture):
    case = CASES[name]
    compiled = compile_ahead(case.kernel, case.signature, case.constants, architecture, **case.options)
    assert compiled.shared_bytes <= {80: 163, 90: 227, 100: 227}[architecture] * 1024, compiled
    if architecture == 90:
        assert compiled.spill_bytes <= SPILLS.get(name, 0), compiled
        assert compiled.uses_wgmma == case.multiplies, compiled


@pytest.mark.parametrize("name", ["attention forward, head 64", "experts d_up", "router forward, Granite, 64"])
def test_some_kernels_compile_for_hopper_without_spills(name):
    check(name, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles(name, architecture):
    check(name, architecture)
