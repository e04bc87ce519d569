"""The plan vs. simulated ranks, in every layout of the table: memory within 4%, bytes equal or, of rows to experts, as
expected of an even router within 1%, waits as listed."""

from pathlib import Path

import pytest
from amfm_simulate.rank import DOCUMENTS
from amfm_simulate.trace import predicted_flops, traced_flops

from amfm.launch.plan.blocks.indexer import Pair
from amfm.model.build import sample_mixer
from amfm.model.config.key_mixer_options import keys_and_scores
from amfm.model.config.pattern import block_kind
from amfm.pretrain.checks.load import load_checked
from benchmarks.command import run
from benchmarks.traced import CASES, PRESET, SETTINGS, compare_bytes, trace_case, traced
from tests.examples.simulate.allowed_waits import expected_waits, sections_of, unnumbered, waits_by_section

CONFIGS = Path(__file__).parents[2] / "configs"
BY_NAME = {case.name: case for case in CASES}
# Whose bytes have no formula, and why.
WITHOUT_FORMULA = ("parallel.zero_stage=3", "train.recompute=", "model.pattern has", "model.moe.capacity_factor=")


def config_of(case):
    return load_checked(CONFIGS / f"{PRESET}.yaml", [*SETTINGS, *case.settings], world_size=case.ranks)


def assert_as_planned(case):
    for entry in trace_case(CONFIGS, case, lambda _: None):
        assert entry.error() == pytest.approx(0, abs=0.04), (entry.rank, entry.predicted, entry.traced["by_line"])
        assert entry.traced["mismatches"] == {}
        assert unnumbered(entry.traced["host_waits"]) == expected_waits(entry.config)
        found = compare_bytes(entry)
        assert found in ("equal", "as expected") or found.startswith(WITHOUT_FORMULA), found
        assert_indexed_blocks_are_counted(entry)


def assert_indexed_blocks_are_counted(entry):
    """FLOPs of blocks with an indexer, over the pairs that simulated rows have, without attention's scores that are made again.

    Dense attention reads the keys of a document, and a row has DOCUMENTS of them; an indexer scores all keys of a row. Each tensor
    rank does all of an indexer's part, where MFU counts its share. Backward makes scores again, and so does a warm-up's loss. Chosen
    keys are counted on only one rank: a context rank's share of them is its own.
    """
    config, layout, planned, traced = entry.config, entry.layout, predicted_flops(entry), traced_flops(entry)
    length, letters = config.train.sequence_length, config.model.letters
    for letter in set(letters):
        options, kind = config.model.block_options(letter), block_kind(letter)
        indexer = getattr(options, "indexer", None)
        is_cut = layout.tensor * layout.context > 1
        if indexer is None or (indexer.stage == "sparse" and is_cut):
            continue
        pair, (read, scores) = Pair.of(options, layout.tensor), keys_and_scores(indexer, length)
        named = sample_mixer(config.model, letter).named_parameters()
        matrices = sum(weight.numel() for name, weight in named if "indexer." in name and weight.dim() > 1)
        own, again = 3 * (2 * matrices + scores) * (1 - 1 / layout.tensor), read * pair.scores
        if indexer.stage == "warm_up":
            seen = (length / DOCUMENTS + 1) / 2
            own -= 3 * (read - seen) * pair.dense
            again += seen * pair.scores
        times = letters.count(letter) * layout.tokens(config) * layout.micro_batches(config)
        expected = planned[kind] + times * own
        assert traced[kind] - times * again == pytest.approx(expected, rel=0.04), (kind, traced, planned)


def test_the_table_has_every_axis_schedule_stage_and_recurrence_and_no_wait_is_listed_in_vain():
    assert len(BY_NAME) == len(CASES) >= 24
    configs = [config_of(case) for case in CASES]
    sections = [config.parallel for config in configs]
    assert {section.zero_stage for section in sections} == {0, 1, 2, 3}
    assert {section.schedule for section in sections} == {"1f1b", "interleaved", "zero_bubble"}
    for axis in ("tensor", "expert", "expert_tensor_size", "context", "pipeline"):
        sizes = [getattr(section, axis) for section in sections]
        assert max(size() if callable(size) else size for size in sizes) > 1
    letters = {letter for config in configs for letter in config.model.letters}
    assert letters >= {"M", "*", "-", "E"}
    assert len(letters) >= 4 + 8
    assert {config.train.recompute for config in configs} == {"none", "selective", "full"}
    assert {name for config in configs for name in sections_of(config)} >= waits_by_section().keys()


@pytest.mark.slow
def test_memory_bytes_and_waits_of_one_layout_are_as_planned():
    assert_as_planned(BY_NAME["kda, tensor, ZeRO 2"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=BY_NAME.keys())
def test_memory_bytes_and_waits_are_as_planned(case):
    assert_as_planned(case)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "ZeRO 4"], "'ZeRO 4' is not a layout of the table; use one of ZeRO 0, ZeRO 1"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_message_and_exit_2(arguments, message, capsys):
    assert run(traced, arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
