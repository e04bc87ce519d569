"""What blocks of the presets launch compiles, fits on the GPU and spills nothing that is not known."""

from pathlib import Path

import pytest

from amfm.kernels.cases.operation import KernelLaunch
from amfm.kernels.proof.ahead_of_time import compile_ahead
from amfm.kernels.proof.operations import all_launches
from amfm.kernels.runtime.backend import INTERPRETED, find_miscompile, triton_version
from benchmarks.kernels.presets import record_preset

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "tiny_cpu")
compiles = pytest.mark.skipif(
    INTERPRETED or find_miscompile(triton_version(), 9) is not None, reason="compiles nothing for sm_90"
)
# Most bytes of spills a thread on sm_90, by kernel and some of its constants, for the reasons in
# docs/benchmarks/kernels_ahead_of_time.md; of what several rows fit, the largest.
SPILLS = {
    ("gradients_kernel",): 88,
    ("gradients_kernel", "BLOCK_K=256"): 344,
    ("norm_backward_kernel", "BLOCK_S=8192"): 32,
    ("fp8_up_kernel",): 40,
    ("route_forward_kernel", "SIZE=128", "CHOICES=8"): 8,
}


def compile_form(launch: KernelLaunch, architecture: int) -> None:
    compiled = compile_ahead(launch.kernel, launch.signature, launch.constants, architecture, **launch.options)
    assert compiled.shared_bytes <= 227 * 1024, launch.name
    assert not compiled.transposed_products, launch.name
    if architecture == 90:
        kernel, words = launch.kernel.fn.__name__, launch.name
        allowed = [most for (name, *parts), most in SPILLS.items() if name == kernel and all(p in words for p in parts)]
        assert compiled.spill_bytes <= max(allowed, default=0), (launch.name, compiled)


def test_a_recorded_launch_is_what_the_case_of_its_kernel_lists() -> None:
    """The same forms, found in two ways: constants, types of pointers and options are equal."""
    recorded = record_preset(CONFIGS / "nemotron3_nano_30b.yaml").values()
    listed = {
        (launch.kernel.fn.__name__, str(sorted(launch.constants.items(), key=str)), str(launch.options)): launch
        for launch in all_launches()
    }
    pairs = [
        (launch, listed[key])
        for launch in recorded
        if (key := (launch.kernel.fn.__name__, str(sorted(launch.constants.items(), key=str)), str(launch.options)))
        in listed
    ]
    assert len(pairs) >= 5
    for ours, theirs in pairs:
        pointers = {name: kind for name, kind in ours.signature.items() if kind[0] == "*" and "32" not in kind}
        assert pointers == {name: theirs.signature[name] for name in pointers}, ours.name


@compiles
def test_kernels_of_a_state_of_256_compile_for_hopper_without_spills() -> None:
    forms = record_preset(CONFIGS / "falcon_h1_7b_like.yaml").values()
    wide = [form for form in forms if "SAVE=True" in form.name or ("OUT=True" in form.name)]
    assert [form.kernel.fn.__name__ for form in wide] == ["chunk_state_kernel", "norm_backward_kernel"]
    for form in wide:
        compile_form(form, 90)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_blocks_of_a_preset_launch_compiles(preset: str, architecture: int) -> None:
    for form in record_preset(CONFIGS / f"{preset}.yaml").values():
        if form.first_architecture <= architecture:
            compile_form(form, architecture)
