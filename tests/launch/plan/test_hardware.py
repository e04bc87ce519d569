"""Hardware of the user's own, from a file."""

import pytest

from amfm.launch.plan.hardware import ASSUMED, HARDWARE, LIBRARY_GROUPED, LIBRARY_NARROW, Hardware, load_hardware


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
