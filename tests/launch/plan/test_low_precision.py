"""Plans of recipes of low precision: products at another peak, passes that quantise, and blocks that stay wide."""

from __future__ import annotations

import pytest

from amfm.launch.plan.activations import Storage, storage_of
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.launch.plan.estimate import Assumptions, estimate, estimate_as_dict
from amfm.launch.plan.hardware import HARDWARE
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.low_precision import narrow_flops_per_token
from amfm.launch.plan.roofline import Roofline
from amfm.launch.plan.stand_ins import Cut
from amfm.launch.plan.time import block_seconds, estimate_step
from amfm.model.config.low_precision import LowPrecisionConfig
from amfm.model.flops import flops_per_token
from tests.launch.plan.presets import H100, preset

FP8, EVEN = "low_precision.recipe=fp8_block", Assumptions(imbalance=1.0)


def test_a_large_product_takes_its_flops_at_the_peak_of_its_recipe_and_its_weights_are_quantised():
    rows, inputs, outputs = 65536, 8192, 16384
    line = Roofline(H100, "bf16", 2, recipes={"in_proj.weight": "fp8_block"})
    line.product(rows, inputs, outputs, weight="in_proj.weight")
    flops = 3 * 2 * rows * inputs * outputs / (1979e12 * 0.50)
    # bf16 read, and a byte and a 32nd written, either way apart. Kernels that quantise rows are in what a block moves.
    moved = 2 * inputs * outputs * (2 + 1 + 1 / 32)
    assert line.seconds == pytest.approx(flops + moved / (3.35e12 * 0.75), rel=1e-12)
    other = Roofline(H100, "bf16", 2, recipes={"in_proj.weight": "fp8_block"})
    other.product(rows, inputs, outputs, weight="shared_proj")
    plain = Roofline(H100, "bf16", 2)
    plain.product(rows, inputs, outputs)
    assert other.seconds == plain.seconds, "a weight without a recipe"
    third_wide = Roofline(H100, "bf16", 2, recipes={"up": "fp8_block"}, wide_gradient=True)
    third_wide.product(rows, inputs, outputs, weight="up")
    assert line.seconds < third_wide.seconds < plain.seconds


def test_few_rows_for_an_expert_gain_little_since_weights_bind():
    def gain(rows):
        narrow, wide = Roofline(H100, "bf16", 2, recipes={"experts.up": "fp8_block"}), Roofline(H100, "bf16", 2)
        for line in (narrow, wide):
            line.product(rows, 1024, 2688, groups=64, weight="experts.up")
        return wide.seconds / narrow.seconds

    assert gain(64 * 64) < 1 < 1.2 < gain(64 * 8192)


def test_blocks_that_stay_wide_take_what_they_took():
    layout = Layout(64, 1, 8)  # rows enough that products gain
    wide, narrow, last = (
        preset("ladder_8b_a1b", *settings) for settings in ((), (FP8,), (FP8, "low_precision.bf16_last_layers=1"))
    )
    seconds = [
        sum(estimate_step(each, layout, H100, storage_of(each), overlap=0.0).compute.values())
        for each in (wide, narrow, last)
    ]
    letter, passes = wide.model.letters[-1], layout.micro_batches(wide)
    one = [
        block_seconds(narrow, letter, layout, H100, storage_of(narrow), 1.0, is_narrow=is_narrow)
        for is_narrow in (False, True)
    ]
    assert seconds[2] - seconds[1] == pytest.approx(passes * (one[0] - one[1]), rel=1e-6)
    assert seconds[1] < seconds[2] < seconds[0], seconds
    all_wide = preset("ladder_8b_a1b", FP8, "low_precision.bf16_first_layers=1", "low_precision.block_types=M")
    found = estimate_step(all_wide, layout, H100, storage_of(all_wide), overlap=0.0).compute
    assert found["moe"] == estimate_step(wide, layout, H100, storage_of(wide), overlap=0.0).compute["moe"]


def test_weights_quantised_once_a_step_take_fewer_passes_and_room_for_their_codes():
    narrow, kept = (preset("turbos_560b", FP8, *more) for more in ((), ("low_precision.quantize_weights=each_step",)))
    layout = Layout.of(narrow, 2048)
    first, second = (estimate(each, layout, H100, EVEN) for each in (narrow, kept))
    codes = second.memory.parts["codes of weights"]
    # Made for each product, those of one expert's larger matrix at a time.
    assert first.memory.parts["codes of weights"] == pytest.approx((1 + 1 / 32) * 2 * 17024 * 5120)
    # Nearly all of a rank's weights take the recipe: a byte and a 32nd in either direction, where bf16 takes two.
    assert 0.9 < codes / second.memory.parts["weights"] < 1.04
    assert second.step.total() < 0.95 * first.step.total()


def test_the_flops_of_a_recipe_are_those_of_its_products():
    config = preset("ladder_8b_a1b", FP8)
    model, moe, mamba = config.model, config.model.moe, config.model.mamba
    letters, hidden = model.letters, model.hidden_size
    inner = mamba.num_heads * mamba.head_dim
    in_rows = 2 * inner + 2 * mamba.num_groups * mamba.state_size + mamba.num_heads
    matrices = 2 if moe.activation == "squared_relu" else 3
    widths = moe.top_k * moe.expert_hidden_size + moe.shared_expert_hidden_size
    counted = letters.count("M") * hidden * (in_rows + inner) + letters.count("E") * matrices * hidden * widths
    found = narrow_flops_per_token(model, config.low_precision)
    assert found == {"fp8_block": pytest.approx(6 * counted)}
    assert found["fp8_block"] < sum(flops_per_token(model, config.train.sequence_length).values())
    two = preset("ladder_8b_a1b", FP8, "low_precision.weight_gradient=bf16")
    assert narrow_flops_per_token(two.model, two.low_precision) == {"fp8_block": pytest.approx(4 * counted)}


def test_mfu_stays_that_of_bf16_and_a_second_one_counts_each_product_at_its_peak():
    config, layout = preset("ladder_8b_a1b", FP8), Layout(64, 1, 1)
    found, plain = (estimate(each, layout, H100, EVEN) for each in (config, preset("ladder_8b_a1b")))
    assert found.mfu == pytest.approx(plain.mfu * plain.step.total() / found.step.total())
    narrow = narrow_flops_per_token(config.model, config.low_precision)["fp8_block"]
    whole = sum(flops_per_token(config.model, config.train.sequence_length).values())
    assert found.mfu_mixed == pytest.approx(found.mfu * (1 - narrow / whole * (1 - 989 / 1979)))
    assert estimate_as_dict(found)["step"]["mfu_mixed"] == found.mfu_mixed
    assert plain.mfu_mixed is None and "mfu_mixed" not in estimate_as_dict(plain)["step"]


def test_hardware_without_a_recipes_products_is_named_and_emulation_is_planned_wide():
    config = preset("ladder_8b_a1b", "low_precision.recipe=nvfp4", "low_precision.bf16_last_layers=0.15")
    with pytest.raises(ValueError, match=r"H100 SXM has no products of low_precision\.recipe=\w+; plan for another"):
        estimate(config, Layout(64, 1, 1), H100, EVEN)
    assert estimate(config, Layout(64, 1, 1), HARDWARE["b200"], EVEN).mfu_mixed is not None
    emulated = preset("ladder_8b_a1b", "low_precision.recipe=nvfp4", "low_precision.emulate=true")
    plain = estimate(preset("ladder_8b_a1b"), Layout(64, 1, 1), H100, EVEN)
    assert estimate(emulated, Layout(64, 1, 1), H100, EVEN).step == plain.step


def test_turbos_is_planned_faster_by_at_least_a_twentieth():
    found = [
        estimate(config, Layout.of(config, 2048), H100, Assumptions()).step.total()
        for config in (preset("turbos_560b"), preset("turbos_560b", FP8), preset("turbos_560b_fp8"))
    ]
    # Both have one expert per rank, in bf16 by the library and in FP8 by our kernels.
    assert 1.05 < found[0] / found[1] < 1.2, "a prediction, of the code as it is"
    assert 1.15 < found[0] / found[2] < 1.35


def test_turbos_keeps_fewer_activations_as_codes_of_inputs_and_of_hidden_rows():
    plans = {
        name: estimate(config, Layout.of(config, 2048), H100, EVEN)
        for name, config in (
            ("bf16", preset("turbos_560b")),
            ("fp8", preset("turbos_560b", FP8)),
            ("saved", preset("turbos_560b", FP8, "low_precision.activation_storage=fp8")),
        )
    }
    kept = {name: found.memory.parts["activations"] / 2**30 for name, found in plans.items()}
    assert kept["saved"] < 16 < 22 < kept["fp8"] < kept["bf16"]
    # Of routed experts an epilogue writes a byte where it wrote two; of shared ones codes are a pass of their own.
    assert plans["saved"].step.total() < 1.02 * plans["fp8"].step.total()


def test_experts_whose_epilogues_make_codes_read_and_write_no_wide_activation():
    """Their kernels move nothing per hidden unit between forward products, and half in backward of what rows in bf16 take."""

    def moved(units, saved="bf16"):
        model = preset("ladder_8b_a1b").model
        moe = model.moe.model_copy(update={"expert_hidden_size": units, "activation": "swiglu"})
        cut = Cut(narrow=LowPrecisionConfig(recipe="fp8_block", activation_storage=saved))
        found = block_bytes(model.model_copy(update={"moe": moe}), "E", Storage(2, "triton"), cut).kernels
        return [each / moe.top_k for each in found]

    short, long, kept, longer = moved(1024), moved(1152), moved(1024, "fp8"), moved(1152, "fp8")
    # Halves of gated units begin at blocks of 128 codes, or are wide between products.
    wide, wider = moved(1088), moved(1216)
    assert long[0] == pytest.approx(short[0]), "forward"
    codes, rows, plain = ((b[1] - a[1]) / 128 for a, b in ((kept, longer), (short, long), (wide, wider)))
    assert (wider[0] - wide[0]) / 128 > 5 and rows < 0.6 * plain
    # Of hidden rows, twice the units, a byte and a 32nd is read for two.
    assert rows - codes == pytest.approx(2 * (2 - 1 - 1 / 32), abs=0.01)
