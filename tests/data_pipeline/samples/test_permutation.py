import numpy as np
import pytest

from amfm.data_pipeline.samples.permutation import BlockLayout, derive_key, permute, permute_in_blocks

SIZES = (1, 2, 3, 4, 5, 7, 16, 63, 64, 65, 1000, 4097, 65536, 70001)


@pytest.mark.parametrize("size", SIZES)
def test_shuffle_is_a_bijection(size):
    out = permute(np.arange(size), size, derive_key(1, size))
    assert np.array_equal(np.sort(out), np.arange(size))


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        pytest.param(layout, size, marks=[pytest.mark.slow] if layout == (4, 3) and size > 2**14 else [])
        for layout in ((4, 3), (16, 4), (256, 512))
        for size in SIZES
    ],
)
def test_block_shuffle_is_a_bijection_with_any_rest(layout, size):
    out = permute_in_blocks(np.arange(size), size, derive_key(2, size), BlockLayout.for_size(size, *layout))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_shuffle_of_one_position_equals_shuffle_of_all():
    size, key = 10_007, derive_key("seek")
    everything, in_blocks = permute(np.arange(size), size, key), permute_in_blocks(np.arange(size), size, key)
    for position in (0, 1, 4999, size - 1):
        assert permute(position, size, key) == everything[position]
        assert permute_in_blocks(position, size, key) == in_blocks[position]


@pytest.mark.parametrize("size", SIZES)
def test_few_positions_are_shuffled_as_many_are(size):
    """Up to 32 positions go through Python integers, more through arrays."""
    key, positions = derive_key(5, size), np.arange(size)
    few = [permute(positions[start : start + 7], size, key) for start in range(0, min(size, 500 * 7), 7)]
    assert np.array_equal(np.concatenate(few), permute(positions, size, key)[: sum(map(len, few))])


def test_shuffle_works_at_fifteen_trillion_tokens():
    size = 15 * 10**12 // 4096
    positions = np.arange(size - 2000, size)
    out = permute(positions, size, derive_key("large"))
    assert len(np.unique(out)) == 2000 and out.min() >= 0 and out.max() < size
    assert abs(out.mean() / size - 0.5) < 0.03  # 5 standard errors of a uniform mean over 2000 draws are 0.032


def test_places_are_uniform_by_chi_square():
    """Where position 0..99 of 100 lands over 2000 keys: 99 x 99 degrees of freedom, bound at 5 standard deviations."""
    size, num_keys = 100, 2000
    counts = np.zeros((size, size))
    for key in range(num_keys):
        counts[np.arange(size), permute(np.arange(size), size, derive_key("chi", key))] += 1
    expected = num_keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom), chi_square


def test_neighbours_are_uncorrelated_as_in_numpys_permutation():
    size = 100_000
    out = permute(np.arange(size), size, derive_key("serial")).astype(float)
    for lag in (1, 2, 3, 64):
        correlation = np.corrcoef(out[:-lag], out[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size), (lag, correlation)


def test_other_keys_give_unrelated_orders():
    first, second = (permute(np.arange(5000), 5000, derive_key("key", seed)) for seed in (0, 1))
    assert (first == second).sum() < 15  # 1 expected
    assert derive_key("ab", "c") != derive_key("a", "bc")


def test_block_shuffle_reads_neighbours_within_a_bounded_stretch():
    size = 100_000
    layout = BlockLayout.for_size(size, 64, 16)
    out = permute_in_blocks(np.arange(size), size, derive_key("locality"), layout)
    group = layout.block_windows * layout.blocks_per_group
    blocks_read = {int(block) for block in out[:group] // layout.block_windows}
    assert len(blocks_read) == layout.blocks_per_group
    assert len({int(block) for block in out[:64] // 64}) > 8, "samples of one batch come from many blocks"


def test_position_outside_the_epoch_is_refused():
    with pytest.raises(ValueError, match="position 10 must be below the number of elements 10"):
        permute([3, 10], 10, derive_key(0))
    with pytest.raises(ValueError, match="must be in range"):
        permute_in_blocks(10, 10, derive_key(0))
