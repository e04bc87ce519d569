"""Memory by its parts: states, activations, gradients on their way, and what an axis takes of it."""

from dataclasses import replace

import pytest

from amfm.launch.plan.activations import BlockBytes, head_bytes, storage_of
from amfm.launch.plan.blocks.cut import cut_of
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.launch.plan.in_flight import moments_of
from amfm.launch.plan.layout import Layout, held_by_stages
from amfm.launch.plan.memory import (
    block_sizes,
    building_bytes,
    busiest_pass,
    estimate_memory,
    persistent_bytes,
    waiting_gradients,
)
from amfm.launch.plan.step_memory import product_bytes, reduction_bytes
from amfm.launch.plan.time import estimate_step
from amfm.model.flops import count_parameters
from amfm.model.moe.transfer import expected_ranks
from amfm.pretrain.config.optimizers import MuonConfig
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.recompute import recomputed_letters
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from tests.launch.plan.presets import H100, preset
from tests.pretrain.tiny_run import tiny_config


def test_memory_of_states_follows_the_zero_stage():
    config = preset("ladder_1b_a300m")
    total = count_parameters(config.model).total
    parts = {
        stage: estimate_memory(config, Layout(8, stage, 1), storage_of(config), margin=0.0).parts for stage in range(4)
    }
    assert [parts[stage]["weights"] for stage in range(4)] == [2 * total, 2 * total, 2 * total, 2 * total / 8]
    assert [parts[stage]["moments"] for stage in range(4)] == [8 * total, total, total, total]
    # Float32 sums of whole gradients, under ZeRO 0 and 3 next to the bf16 ones; under ZeRO 2 a share, and one or two
    # buckets.
    expected = {0: 6 * total, 1: 4 * total, 3: 6 * total}
    assert all(parts[stage]["gradients"] == size for stage, size in expected.items() if "activations" in parts[stage])
    assert 4 * (total / 8 + 50_000_000) < parts[2]["gradients"] < 4 * total


def test_activations_grow_with_rows_and_one_micro_batch_needs_no_float32_sums():
    config = preset("ladder_1b_a300m")
    one, two = (estimate_memory(config, Layout(8, 2, rows), storage_of(config), margin=0.0) for rows in (1, 2))
    assert two.parts["activations"] == pytest.approx(2 * one.parts["activations"])
    single = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 8})})
    alone = estimate_memory(single, Layout(8, 2, 1), storage_of(single), margin=0.0)
    assert alone.total() < one.total()
    total = count_parameters(config.model).total
    # Under ZeRO 0 sums of float32 are next to gradients of bf16; one micro-batch has no sums.
    (held,) = held_by_stages(config.model, Layout(8, 0, 1), config.train.sequence_length)
    layout, storage = Layout(8, 0, 1), storage_of(config)
    sizes = block_sizes(config, layout, storage, 1.0, held.letters)
    two = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 16})})
    peaks = [busiest_pass(given, layout, storage, held, sizes)["gradients"] for given in (config, two, single)]
    assert peaks[:2] == [6 * total, 6 * total] and peaks[2] <= 2 * total


def test_what_is_not_said_is_the_kernels_of_the_device_and_an_even_load():
    config = preset("ladder_1b_a300m")

    def backend(given, on_gpu, precision="bf16"):
        kernels = config.kernels.model_copy(update={"backend": given})
        train = config.train.model_copy(update={"precision": precision})
        return storage_of(config.model_copy(update={"kernels": kernels, "train": train}), on_gpu=on_gpu).backend

    assert [backend("auto", True), backend("auto", False), backend("auto", True, "float32")] == [
        "triton",
        "torch",
        "torch",
    ]
    assert [backend("torch", True), backend("triton", False)] == ["torch", "triton"]
    layout, storage = Layout(8, 1, 1, expert=8), storage_of(config)
    even, full = (estimate_memory(config, layout, storage, margin=0.0, imbalance=load).total() for load in (1.0, 2.0))
    assert estimate_memory(config, layout, storage, margin=0.0).total() == even < full


def test_recomputed_blocks_keep_their_input_alone():
    plain = Layout(8, 2, 1)
    activations = {}
    for overrides in ((), ("train.recompute=selective", "train.recompute_blocks=M"), ("train.recompute=full",)):
        config = preset("ladder_1b_a300m", *overrides)
        layout = replace(plain, recompute=recomputed_letters(config))
        activations[overrides] = estimate_memory(config, layout, storage_of(config), margin=0.0).parts["activations"]
    kept, some, least = activations.values()
    assert least < some < kept
    blocks = len(config.model.letters)
    assert least >= 2 * config.train.sequence_length * config.model.hidden_size * blocks
    assert least < 0.12 * kept


def test_margin_is_a_part_of_the_rest():
    config = preset("ladder_150m")
    plain, wide = (estimate_memory(config, Layout(1, 1, 1), storage_of(config), margin=m).total() for m in (0.0, 0.2))
    assert wide == pytest.approx(1.2 * plain)


def test_gradients_that_arrive_take_their_share_beside_the_sums():
    config = preset("ladder_1b_a300m")
    parameters = count_parameters(config.model).total
    for precision, ranks, shares in (("float32", 1, 0.0), ("bf16", 8, parameters / 8)):
        run = preset("ladder_1b_a300m", f"train.precision={precision}")
        layout, storage = Layout(ranks, 1, 1), storage_of(run)
        (held,) = held_by_stages(run.model, layout, run.train.sequence_length)
        parts = reduction_bytes(held, layout, storage)
        assert parts == {"gradients": pytest.approx(4 * (parameters + shares))}
    # ZeRO 0: DeepSpeed joins a bucket, and in bf16 sends it in float32.
    (held,) = held_by_stages(config.model, Layout(8, 0, 1), config.train.sequence_length)
    assert reduction_bytes(held, Layout(8, 0, 1), storage_of(config))["communication"] == 6 * min(
        parameters, 500_000_000
    )


def test_a_single_rank_gathers_no_weights_under_zero_3():
    config = preset("ladder_150m")
    alone, two = (estimate_memory(config, Layout(ranks, 3, 1), storage_of(config), margin=0.0) for ranks in (1, 2))
    assert "gathered weights" not in alone.parts
    total = count_parameters(config.model).total
    assert two.parts["gathered weights"] == pytest.approx(2 * total)  # most loaded at the head: all have arrived


def test_pipelines_hold_what_their_schedule_has_in_flight():
    plain, interleaved = (
        Layout(4, 1, 1, pipeline=4),
        Layout(4, 1, 1, pipeline=4, virtual_stages=2, schedule="interleaved"),
    )
    zero_bubble = replace(plain, schedule="zero_bubble")

    def most(layout, stage, micro_batches=8):
        return max(sum(found.held) for found in moments_of(layout, stage, micro_batches))

    assert [most(plain, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert most(plain, 0, micro_batches=2) == 2
    # Stages that begin fewer micro-batches put off the gradients of as many more weights.
    assert [most(zero_bubble, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [max(sum(found.cut) for found in moments_of(zero_bubble, stage, 8)) for stage in range(4)] == [0, 1, 2, 3]
    assert [most(interleaved, stage) for stage in range(4)] == [11, 9, 7, 5]
    # Where the last piece begins, four micro-batches of the first one wait for their backward pass.
    assert (4, 1) in {found.held for found in moments_of(interleaved, 3, 8) if found.is_forward and found.piece == 1}


def test_a_block_is_cut_by_what_concerns_it():
    roomy = preset("nemotron3_super_120b", ranks=512)
    places = cut_of(roomy, Layout.of(roomy, 512), "E", 1.2)
    assert (places.sent, places.rows, places.room) == (0.0, 1.0, 1.25)
    config = preset("nemotron3_super_120b", "parallel.expert_buffer_factor=null", ranks=512)
    moe, layout = config.model.moe, Layout.of(config, 512)
    experts, scan = (cut_of(config, layout, letter, 1.2) for letter in "EM")
    assert experts.sent == expected_ranks(moe, 8) < 8 < moe.top_k
    assert (experts.rows, experts.expert, experts.context) == (1.2, 8, 1)
    assert (scan.sent, scan.expert, scan.context) == (0.0, 1, layout.context)
    turbos = preset(
        "turbos_560b",
        "model.moe.capacity_factor=1.0",
        "parallel.tensor=1",
        "parallel.context=1",
        "parallel.sequence_parallel=false",
    )
    assert cut_of(turbos, Layout.of(turbos, 256), "E", 1.2).sent == 0.0  # in slots


def test_gradients_lie_there_once_their_piece_has_been_passed():
    interleaved = Layout(16, 1, 1, pipeline=4, virtual_stages=2, schedule="interleaved")
    # As many micro-batches as stages: all forward passes of the first stage come before the first backward pass.
    few, many = (moments_of(interleaved, 0, number) for number in (4, 16))
    assert not any(any(found.passed) for found in few if found.is_forward)
    assert {found.passed for found in few} == {(False, False), (False, True), (True, True)}
    assert any(all(found.passed) for found in many if found.is_forward)


def test_at_the_second_slice_of_logits_both_products_lie_beside_their_float32_sum():
    config = preset("nemotron3_super_120b")
    model, storage = config.model, storage_of(config)
    rows = 2048  # of a slice of 131,072 logits
    one, two = (head_bytes(model, storage, slices * rows)[1] for slices in (1, 2))
    assert two - one == model.vocab_size * model.hidden_size * (4 + storage.element_bytes)


def test_a_pass_that_is_cut_leaves_what_the_gradients_of_weights_are_made_of():
    config = preset("nemotron3_nano_30b", ranks=64)
    layout, storage = Layout.of(config, 64), storage_of(config)
    first, last = held_by_stages(config.model, layout, config.train.sequence_length)

    def planned(held, schedule):
        ordered = replace(layout, schedule=schedule)
        sizes = block_sizes(config, ordered, storage, 1.0, held.letters)
        return busiest_pass(config, ordered, storage, held, sizes)["activations"]

    cut = {letter: cut_of(config, replace(layout, schedule="zero_bubble"), letter, 1.0) for letter in set(last.letters)}
    left = sum(block_bytes(config.model, letter, storage, cut[letter]).left for letter in last.letters)
    # The last stage has a micro-batch under way, and the factors of another, whose weights it put off.
    more = planned(last, "zero_bubble") - planned(last, "1f1b")
    assert more == pytest.approx(layout.tokens(config) * left, rel=0.01)
    # The first stage computes its weights' gradients at once: the factors of one pass, next to what is not yet passed.
    assert planned(first, "1f1b") < planned(first, "zero_bubble") < 1.4 * planned(first, "1f1b")


def test_gradients_that_others_of_the_same_weight_join_wait_beside_prediction_depths():
    config = preset("nemotron3_ultra_550b", ranks=1024)
    model, layout = config.model, Layout.of(config, 1024)
    held = held_by_stages(model, layout, config.train.sequence_length)[-1]
    table = 2 * model.vocab_size * model.hidden_size / layout.tensor
    waiting = waiting_gradients(model, layout, held, 2, expert_gradients=5.0, kept_head=3.0)
    # Two depths of attention and shared experts: the first waits for nothing but the main loss, the second for both.
    assert held.letters[-4:] == ("*", "E", "*", "E")
    assert waiting[-2:] == [table + 3.0] * 2 and waiting[-4:-2] == [2 * table + 8.0] * 2
    assert not any(waiting[:-4])
    plain = preset("nemotron3_nano_30b", ranks=64)
    last = held_by_stages(plain.model, Layout.of(plain, 64), plain.train.sequence_length)[-1]
    assert not any(waiting_gradients(plain.model, Layout.of(plain, 64), last, 2, 5.0, 3.0))

    # The most loaded moment is in an expert block of the first depth, where experts work with more than anything else takes.
    storage = storage_of(config)
    assert storage.accumulates, "experts leave no gradients of their own"
    sizes = block_sizes(config, layout, storage, 1.0, held.letters)
    sizes["E"] = replace(sizes["E"], working=1e6)
    kept_head, _ = head_bytes(model, storage, layout.tokens(config), layout.tensor, accumulates=True)
    working = busiest_pass(config, layout, storage, held, sizes)["working space"]
    assert working - 1e6 * layout.tokens(config) == pytest.approx(2 * table + kept_head)


def test_the_head_of_tensor_ranks_adds_to_its_sum_while_logits_are_there():
    config = preset("ladder_20m", "parallel.tensor=2", "train.global_batch_size=32")
    layout, storage, model = Layout.of(config, 8), storage_of(config), config.model
    assert layout.micro_batches(config) == 1 and storage.accumulates
    (held,) = held_by_stages(model, layout, config.train.sequence_length)
    sizes = {letter: BlockBytes(0.0, 0.0) for letter in held.letters}
    parts = busiest_pass(config, layout, storage, held, sizes)
    assert parts["logits"] > 0
    assert parts["gradients"] == 4 * model.vocab_size * model.hidden_size / 2


def test_pieces_of_unequal_size_are_held_in_unequal_numbers():
    config = preset(
        "ladder_1b_a300m", "parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2"
    )
    layout = Layout.of(config, 8)
    last = held_by_stages(config.model, layout, config.train.sequence_length)[1]
    assert sum(last.pieces, ()) == last.letters and len(last.pieces) == 2
    assert sum(map(sum, last.parts)) == pytest.approx(last.parameters)


def test_an_axis_takes_its_part_of_memory_and_adds_its_exchange():
    config = preset("ladder_8b_a1b", "train.global_batch_size=512")
    storage = storage_of(config)
    alone = estimate_memory(config, Layout(64, 1, 1), storage, margin=0.0).parts
    cut = estimate_memory(
        config, Layout(64, 1, 1, tensor=4, sequence_parallel=True, expert_tensor=4), storage, margin=0.0
    )
    assert cut.parts["weights"] == pytest.approx(alone["weights"] / 4)
    assert alone["activations"] / 4 < cut.parts["activations"] < 0.5 * alone["activations"]
    spread = estimate_memory(config, Layout(64, 1, 1, expert=8), storage, margin=0.0, imbalance=1.0)
    uneven = estimate_memory(config, Layout(64, 1, 1, expert=8), storage, margin=0.0, imbalance=2.0)
    assert spread.parts["weights"] < 0.3 * alone["weights"]
    assert uneven.total() > spread.total()
    for layout, axis in (
        (Layout(64, 1, 1, tensor=4, sequence_parallel=True, expert_tensor=4), "tensor"),
        (Layout(64, 1, 1, expert=8), "expert"),
        (Layout(64, 1, 1, context=2), "context"),
    ):
        assert set(estimate_step(config, layout, H100, storage, overlap=0.5).communication) == {axis}
    staged = estimate_step(config, Layout(64, 1, 1, pipeline=4), H100, storage, overlap=0.5)
    busy = sum(staged.compute.values()) + sum(staged.communication.values())
    assert staged.bubble == pytest.approx(3 * busy / (512 / 16))


def test_building_needs_the_whole_model_in_float32_before_it_is_spread():
    config = preset("nemotron3_nano_30b")
    layout = Layout(64, 3, 1, tensor=8)
    (held,) = held_by_stages(config.model, layout, config.train.sequence_length)
    parts = building_bytes(held, layout, storage_of(config))
    assert parts == {"weights in float32": 4 * held.parameters}
    # ZeRO 1: the bf16 weights, DeepSpeed's joined copy of them, and this rank's master weights.
    alone = building_bytes(held, Layout(1, 1, 1, tensor=8), storage_of(config))
    assert sum(alone.values()) == 8 * held.parameters


def test_bf16_states_take_half_and_their_steps_more_time():
    wide = preset("ladder_150m", "train.precision=bf16")
    half = preset("ladder_150m", "train.precision=bf16", "optimizer.state_dtype=bf16")
    layout, length = Layout(8, 1, 1), wide.train.sequence_length
    (held,) = held_by_stages(wide.model, layout, length)
    own = held.share(layout)
    assert persistent_bytes(held, layout, storage_of(half)) | {
        "master weights": 4 * own,
        "moments": 8 * own,
    } == persistent_bytes(held, layout, storage_of(wide))
    assert persistent_bytes(held, layout, storage_of(half))["moments"] == 4 * own
    times = [estimate_step(config, layout, H100, storage_of(config), overlap=0.5) for config in (wide, half)]
    assert times[0].optimizer < times[1].optimizer


def test_muon_keeps_one_moment_of_matrices_and_multiplies_them():
    adamw = preset("ladder_150m")
    muon = adamw.model_copy(update={"optimizer": adamw.optimizer.model_copy(update={"kind": "muon"})})
    layout, storage, length = Layout(8, 1, 1), storage_of(adamw), adamw.train.sequence_length
    (plain,) = held_by_stages(adamw.model, layout, length)
    (held,) = held_by_stages(muon.model, layout, length, muon.optimizer.matrix_settings())
    # All but embedding, head, norms, convolutions, routers.
    assert 0.6 < (held.matrices.dense + held.matrices.routed) / held.parameters < 1.0
    saved = persistent_bytes(plain, layout, storage)["moments"] - persistent_bytes(held, layout, storage)["moments"]
    own = held.own_matrices(layout)
    assert saved == pytest.approx(4 * (own.dense + own.routed))
    assert product_bytes(plain, layout, storage) == 0.0 < product_bytes(held, layout, storage)
    # NorMuon keeps a number for each row more, and needs weights and gradients whole.
    whole = MuonConfig(rule="normuon")
    (kept,) = held_by_stages(muon.model, layout, length, whole)
    more_own = kept.own_matrices(layout)
    rows = 4 * (more_own.dense_state + more_own.routed_state - own.dense - own.routed)
    assert 0 < rows < 0.02 * 4 * own.dense
    more = persistent_bytes(kept, layout, storage)["moments"] - persistent_bytes(held, layout, storage)["moments"]
    assert more == pytest.approx(rows)
    assert product_bytes(kept, layout, storage) > product_bytes(held, layout, storage)
    times = [estimate_step(config, layout, H100, storage, overlap=0.5) for config in (adamw, muon)]
    assert times[0].optimizer < times[1].optimizer < times[0].total()


@pytest.mark.parametrize(
    ("precision", "stage"), [("float32", 0), ("float32", 1), ("float32", 2), ("bf16", 0), ("bf16", 2)]
)
def test_what_stays_is_what_a_run_of_one_rank_holds(precision, stage, data, tmp_path):
    config = tiny_config(data, tmp_path, train__precision=precision, parallel__zero_stage=stage)
    with SignalWatch() as signals:
        run = start_run(config, signals)
        train_step(run)
        parts = run.saver.layout.parts
        held = [*run.engine.module.parameters(), *(part.master for part in parts)]
        held += [run.engine.adamw.state[part.master][name] for part in parts for name in ("exp_avg", "exp_avg_sq")]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        close_run(run)
    layout = Layout.of(config, 1)
    (share,) = held_by_stages(config.model, layout, config.train.sequence_length)
    planned = persistent_bytes(share, layout, storage_of(config, on_gpu=False))
    # Routers are float32 in a bf16 model, and DeepSpeed pads.
    assert sum(storages.values()) == pytest.approx(sum(planned.values()), rel=0.02)
