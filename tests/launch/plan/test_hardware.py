"""Hardware of the user's own, from a file."""

import pytest

from amfm.launch.plan.hardware import (
    ASSUMED,
    FLASH_3,
    HARDWARE,
    LIBRARY_GROUPED,
    LIBRARY_NARROW,
    Hardware,
    load_hardware,
)
from amfm.launch.plan.roofline import Roofline
from amfm.pretrain.config.file import load_config
from tests.launch.plan.presets import CONFIGS


def test_hardware_can_come_from_a_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "name: own\nbf16_flops: 1e14\nfloat32_flops: 1e13\nmemory_gib: 24\nmemory_bytes_per_second: 1e12\n"
        "gpus_per_node: 1\nnode_link_bytes_per_second: 3e10\nnetwork_bytes_per_second: 1e10\n"
    )
    hardware = load_hardware(str(path))
    assert (hardware.memory_gib, hardware.gpus_per_node) == (24, 1)
    assert {name for name in Hardware.model_fields if name.endswith("_efficiency")} - ASSUMED.keys() == {
        "memory_efficiency",
        "link_efficiency",
        "flash_efficiency",
        "flash_backward_efficiency",
        "fp8_own_efficiency",
    }
    silent = {name: getattr(hardware, name) for name in ASSUMED}
    assert silent == {name: getattr(HARDWARE["h100"], name) for name in ASSUMED}
    path.write_text(path.read_text() + "launch_seconds: 0\n")
    assert load_hardware(str(path)) == hardware.model_copy(update={"launch_seconds": 0})
    path.write_text("name: own\nbf16_flop: 1e14\nfloat32_flops: -1\n")
    with pytest.raises(ValueError) as refused:
        load_hardware(str(path))
    text = str(refused.value)
    assert f"{path}:2: bf16_flop = 100000000000000: unknown key; did you mean bf16_flops?" in text
    assert "float32_flops = -1: must be greater than 0" in text
    assert "memory_gib: is missing" in text


def test_our_kernels_of_codes_are_as_far_below_a_librarys_as_our_grouped_products():
    fields = Hardware.model_fields
    for hardware in HARDWARE.values():
        for name, value in LIBRARY_NARROW.items():
            ratio = hardware.grouped_efficiency / LIBRARY_GROUPED
            assert getattr(hardware, name) == pytest.approx(ratio * value, abs=0.005) == fields[name].default


def test_libraries_that_a_run_names_are_planned_at_their_rates_and_shown():
    def rates(gpu, *settings):
        config = load_config(CONFIGS / "turbos_560b_fp8.yaml", list(settings))
        return (gpu if isinstance(gpu, Hardware) else HARDWARE[gpu]).with_libraries(config)

    h100 = HARDWARE["h100"]
    assert rates("h100") == h100
    found = rates("h100", "kernels.experts=torch", "kernels.attention=FA3")
    assert found.name == "H100 SXM (kernels.experts=torch, kernels.attention=FA3)"
    assert (found.fp8_efficiency, found.fp8_own_efficiency) == (LIBRARY_NARROW["fp8_efficiency"], h100.fp8_efficiency)
    assert found.grouped_efficiency == LIBRARY_GROUPED and found.fp8_grouped_efficiency == h100.fp8_grouped_efficiency
    assert {name: getattr(found, name) for name in FLASH_3} == FLASH_3
    blackwell = rates("b200", "kernels.experts=torch", "kernels.attention=FA3")
    assert (blackwell.fp8_efficiency, blackwell.flash_efficiency) == (h100.fp8_efficiency, None)
    measured = h100.model_copy(update={"fp8_efficiency": 0.57})
    assert rates(measured, "kernels.experts=torch").fp8_efficiency == 0.57


def test_a_library_takes_sums_of_whole_blocks_and_copies_column_codes():
    own, fused = (HARDWARE["h100"].model_copy(update=update) for update in (
        {"memory_bytes_per_second": 1e30},
        {"memory_bytes_per_second": 1e30, "fp8_efficiency": 0.60, "fp8_own_efficiency": 0.50},
    ))  # fmt: skip

    def seconds(hardware, inputs, outputs, **how):
        line = Roofline(hardware, "bf16", 2, recipes={"w": "fp8_block"})
        line.product(1024, inputs, outputs, weight="w", **how)
        return line.seconds

    sizes = 512, 1024
    ratio = seconds(fused, *sizes) / seconds(own, *sizes)
    assert ratio == pytest.approx(5 / 6)
    # Two of the three products, where the sum of one is over broken blocks or a kernel of ours makes it.
    assert seconds(fused, 512, 1040) / seconds(own, 512, 1040) == pytest.approx((1 + 2 * 5 / 6) / 3)
    assert seconds(fused, *sizes, is_fused=True) / seconds(own, *sizes) == pytest.approx((1 + 2 * 5 / 6) / 3)
    assert seconds(fused, *sizes, groups=2) == seconds(own, *sizes, groups=2)
