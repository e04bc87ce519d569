"""Products of a kind of block that a package brings, on tensor ranks."""

import pytest

from amfm.launch.plan.blocks.block import add_products, measured_sizes
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline
from tests.launch.plan.presets import H100
from tests.model.small_models import small_config

SIZES = {"ngram_memory": {"num_heads": 2, "head_dim": 4, "table_size": 50}}


def test_matrices_that_tensor_ranks_do_not_cut_are_whole_for_the_tokens_of_each():
    """N-gram memory projects what it looks up with whole matrices."""
    sizes = measured_sizes(small_config("{ngram_memory}", mixers=SIZES), "{ngram_memory}", 64)
    layouts = Layout(2, 1, 1), Layout(2, 1, 1, tensor=2), Layout(2, 1, 1, tensor=2, sequence_parallel=True)
    found = []
    for layout in layouts:
        line = Roofline(H100.model_copy(update={"bf16_flops": 1e9}), "bf16", 2)  # arithmetic binds
        add_products(line, sizes, layout, 1024)
        found.append(line.seconds)
    assert found[0] > 0
    assert found == pytest.approx([found[0], found[0], found[0] / 2])
