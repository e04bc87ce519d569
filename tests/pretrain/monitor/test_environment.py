"""The peak that MFU is measured against."""

import pytest

from amfm.pretrain.monitor.environment import GPU_TERAFLOPS, describe_allocator, find_gpu


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_card_is_known_by_whole_words_of_the_drivers_name(name, card):
    assert find_gpu(name) == card


def test_a_card_is_as_fast_as_its_data_sheet_says_in_float32_too():
    assert all(float32 == pytest.approx(bf16 / 2, rel=0.02) for bf16, float32 in GPU_TERAFLOPS.values())


def test_what_an_allocator_says_is_in_bytes_and_times_and_nothing_is_none_yet():
    statistics = {
        "reserved_bytes.all.peak": 3 << 30,
        "reserved_bytes.all.current": 1,
        "num_alloc_retries": 2,
        "num_ooms": 1,
    }
    assert describe_allocator(statistics) == {"reserved_bytes": 3 << 30, "alloc_retries": 2, "ooms": 1}
    assert describe_allocator({}) == {"reserved_bytes": 0, "alloc_retries": 0, "ooms": 0}
