"""A block's seconds are of the operations that it runs, whoever wrote it."""

from functools import partial

import pytest

import amfm
from amfm.kernels.delta_scan.op import delta_flops
from amfm.launch.plan.activations import Storage
from amfm.launch.plan.blocks.block import add_block, block_cost
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline
from amfm.launch.plan.stand_ins import COUNTED_TOKENS
from amfm.model.config.kinds import find_kind
from amfm.model.config.low_precision import LowPrecisionConfig
from amfm.model.config.mixer_options import GatedDeltaNetOptions
from amfm.model.mixers.delta import GatedDeltaNetMixer
from tests.helpers.registered import nothing_stays_registered  # noqa: F401 a fixture
from tests.launch.plan.presets import H100, preset
from tests.model.small_models import small_config

CARD, ONE = Storage(2, "triton"), Layout(1, 1, 1)
SIZES = {
    "gated_deltanet": {"num_heads": 4, "head_dim": 64},
    "ngram_memory": {"num_heads": 2, "head_dim": 4, "table_size": 50},
}


def run_of(name, options):
    """A run whose model is one block of a kind."""
    config = preset("ladder_20m")
    model = small_config(find_kind(name).symbol, hidden_size=256, mixers={name: options})
    return config.model_copy(update={"model": model, "low_precision": LowPrecisionConfig()})


def seconds_of(name, options):
    line = Roofline(H100, "bf16", 2)
    add_block(line, run_of(name, options), find_kind(name).symbol, ONE, CARD, 1.0)
    return line.seconds


def test_a_mixer_of_a_package_takes_the_seconds_of_ours():
    """The same class under another name; Comba of examples/mixers runs its parts apart, with PyTorch's operations between them."""

    class CopyOptions(GatedDeltaNetOptions):
        """Those of the kind that is copied."""

    amfm.register(amfm.Kind("copied", GatedDeltaNetMixer, CopyOptions))
    own, copied, comba = (seconds_of(name, SIZES["gated_deltanet"]) for name in ("gated_deltanet", "copied", "comba"))
    assert copied == own and 1 < comba / own < 5


def test_flops_of_a_scan_are_those_of_its_operation():
    """A trace counts the same: the scan inside of a mixer that is one operation."""
    options = GatedDeltaNetOptions(**SIZES["gated_deltanet"])
    cost, sizes = block_cost(run_of("gated_deltanet", SIZES["gated_deltanet"]), "G", ONE, CARD, 1.0), (1, 4, 4, 64, 64)
    way = partial(delta_flops, 1, COUNTED_TOKENS, *sizes, chunk_size=options.chunk_size)
    assert cost.scans == pytest.approx(tuple(way(backward=back) / COUNTED_TOKENS for back in (False, True)))


def test_matrices_that_tensor_ranks_do_not_cut_are_whole_for_the_tokens_of_each():
    """N-gram memory projects what it looks up with whole matrices."""
    config, symbol = run_of("ngram_memory", SIZES["ngram_memory"]), "{ngram_memory}"
    layouts = Layout(2, 1, 1), Layout(2, 1, 1, tensor=2), Layout(2, 1, 1, tensor=2, sequence_parallel=True)
    found = [block_cost(config, symbol, layout, CARD, 1.0).products for layout in layouts]
    assert found[0] and found[1] == found[0]
    assert found[2] == tuple(each._replace(rows=each.rows / 2) for each in found[0])


def test_products_are_those_of_all_matrices():
    """Each once, but for convolutions, which mix tokens."""
    config = preset("nemotron3_nano_30b")
    model = config.model
    inner, groups = model.mamba.inner_size(), 2 * model.mamba.num_groups * model.mamba.state_size
    products = {each.weight: each for each in block_cost(config, "M", ONE, CARD, 1.0).products}
    assert products.keys() == {"in_proj.weight", "out_proj.weight"}
    assert products["in_proj.weight"][1:4] == (1.0, model.hidden_size, 2 * inner + groups + model.mamba.num_heads)
    assert products["out_proj.weight"][1:4] == (1.0, inner, model.hidden_size)
    assert [each.is_wide for each in block_cost(config, "E", ONE, CARD, 1.0).products if "router" in each.weight] == [
        True
    ]
