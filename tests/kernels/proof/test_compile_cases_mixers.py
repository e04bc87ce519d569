"""Every kernel of scans, convolution and norms compiles for the cards it is meant for; docs/benchmarks/kernels_ahead_of_time.md has the table."""

import pytest

from kernels.backend import INTERPRETED
from kernels.proof.ahead_of_time import compile_ahead
from kernels.proof.compile_cases_mixers import mixer_cases

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

CASES = {case.name: case for case in mixer_cases()}

# Most bytes of spills a thread on sm_90; everything else has none. Reasons stand in docs/benchmarks/kernels_ahead_of_time.md.
SPILLS = {
    "scan gradients, chunks of 64": 64,
    "scan gradients, chunks of 128": 128,
}


def check(name: str, architecture: int) -> None:
    case = CASES[name]
    compiled = compile_ahead(case.kernel, case.signature, case.constants, architecture, **case.options)
    assert compiled.shared_bytes <= {80: 163, 90: 227, 100: 227}[architecture] * 1024, compiled
    if architecture == 90:
        assert compiled.spill_bytes <= SPILLS.get(name, 0), compiled
        assert compiled.uses_wgmma == case.multiplies, compiled


@pytest.mark.parametrize(
    "name",
    [
        "scan walk, states only, chunks of 64",
        "vector scan gradients of scores",
        "delta walk, states only, 1 step a token",
        "gated norm, groups of 512 (Nemotron), forward",
    ],
)
def test_some_kernels_compile_for_hopper_without_spills(name: str) -> None:
    check(name, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles(name: str, architecture: int) -> None:
    check(name, architecture)
