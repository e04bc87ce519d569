"""What blocks of the presets launch compiles, fits on the GPU and misses no goal for a reason that is not known."""

import pytest

from amfm.kernels.proof.ahead_of_time import compile_ahead
from amfm.kernels.proof.recorded import KernelLaunch
from amfm.kernels.runtime.backend import INTERPRETED, find_miscompile, triton_version
from benchmarks.kernels.compile import ARCHITECTURES, MISSES, SHARED_KIB, find_forms
from benchmarks.kernels.presets import CONFIGS, record_preset

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.fixture(scope="module")
def forms() -> dict[str, KernelLaunch]:
    return {name: launch for name, (launch, _) in find_forms().items()}


def find_faults(launch: KernelLaunch, architecture: int) -> list[str]:
    """Compile a form and name what it takes against the table's own rules."""
    compiled = compile_ahead(launch.kernel, launch.signature, launch.constants, architecture, **launch.options)
    miss = next((miss for miss in MISSES if miss.is_of(launch.name)), None)
    most = 0 if miss is None else miss.before if (triton_version() or ()) < (3, 7) else miss.most
    wgmma = launch.multiplies and (miss is None or miss.has_wgmma)
    rules = {
        "shared memory": compiled.shared_bytes <= SHARED_KIB[architecture] * 1024,
        "transposed products": not compiled.transposed_products,
        "spills": compiled.spill_bytes <= most or architecture != max(90, launch.first_architecture),
        "wgmma": compiled.uses_wgmma == wgmma or architecture != 90,
        "block scales": compiled.uses_block_scales == launch.multiplies or launch.first_architecture != 100,
    }
    return [f"{rule}: {launch.name}: {compiled}" for rule, holds in rules.items() if not holds]


@pytest.mark.skipif(find_miscompile(triton_version(), 9) is not None, reason="this Triton is rejected there")
def test_the_widest_states_and_routers_compile_for_hopper() -> None:
    """Next to a state of 256 the gradients have tiles of their own, and a router of 128 experts half of its rows."""
    wide, routed = (record_preset(CONFIGS / f"{name}.yaml") for name in ("falcon_h1_7b_like", "nemotron3_nano_30b"))
    named = [
        form for form in wide.values() if "BLOCK_K=256" in form.name and form.kernel.__name__ == "gradients_kernel"
    ]
    routers = [form for form in routed.values() if form.kernel.__name__ == "route_forward_kernel"]
    assert "Q=32, " in named[0].name and len(named) == len(routers) == 1
    assert find_faults(named[0], 90) + find_faults(routers[0], 90) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_presets_launch_compiles(forms: dict[str, KernelLaunch], architecture: int) -> None:
    refused = find_miscompile(triton_version(), architecture // 10)
    if refused is not None:
        pytest.skip(f"this Triton is rejected there: {refused}")
    known = [launch for launch in forms.values() if launch.first_architecture <= architecture]
    assert [fault for launch in known for fault in find_faults(launch, architecture)] == []
