"""The presets on simulated clusters of their own size: as planned, and as their headers say."""

import pytest
from amfm_simulate.trace import trace_run

from amfm.launch.plan.hardware import GIB
from tests.examples.simulate.allowed_waits import COUNTED, expected_waits, sections_of, unnumbered
from tests.launch.plan.presets import H100, PRESETS, headers, preset, preset_gpus

# Every layout that a header says was traced, by one of the training stages that it is for.
STATED = [(name, (header.stages or (None,))[0]) for name in PRESETS for header in headers(name) if header.ranks]


def trace(name, ranks, stage):
    """The first ranks of the first and of the last pipeline stage, which peak where the plan says."""
    config = preset(name, ranks=ranks)
    found = trace_run(
        config, ranks, headers(name)[0].hardware, only_rank=None, stage_name=stage, report=lambda *_: None
    )
    for entry in found:
        assert entry.error() == pytest.approx(0, abs=0.04), (entry.rank, entry.predicted, entry.traced["by_line"])
        assert entry.traced["mismatches"] == {}
        assert unnumbered(entry.traced["host_waits"]) == expected_waits(entry.config)
        assert entry.traced["compiled"]["late"] == []
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), STATED, ids=[f"{name} {stage or ''}".strip() for name, stage in STATED])
def test_a_preset_is_traced_as_its_header_says(name, stage):
    header = next(header for header in headers(name) if stage in (header.stages or (None,)))
    traced = {entry.rank: entry.peak_bytes / GIB for entry in trace(name, preset_gpus(name), stage)}
    assert traced == pytest.approx({rank: found for rank, (_, found) in header.ranks.items()}, rel=0.01, abs=0.06)


@pytest.mark.slow
def test_graphs_hold_all_blocks_of_a_preset_on_expert_ranks_but_the_experts():
    settings = "parallel.expert=8", "parallel.zero_stage=1", "train.micro_batch_size=1", "train.cuda_graphs=blocks"
    config = preset("ladder_8b_a1b", *settings, ranks=8)
    (entry,) = trace_run(config, 8, H100, only_rank=None, stage_name=None, report=lambda *_: None)
    found = entry.traced["capture"]
    (read,) = found["E"]["forward"]["host_reads"]
    assert read.startswith("model/moe/by_rank.py"), "splits of rows that are counted, so these blocks run eagerly"
    for letter in set(config.model.letters) - {"E"}:
        for which, passed in found[letter].items():
            assert passed["launches"] > 5 and not passed["host_reads"] and not passed["changed"], (
                letter,
                which,
                passed,
            )
    assert entry.traced["compiled"]["late"] == []


@pytest.mark.parametrize("name", ["nemotron3_nano_30b", "nemotron3_super_120b", "nemotron3_super_nvfp4"])
def test_nano_and_super_wait_for_no_rows_of_experts(name):
    assert COUNTED not in sections_of(preset(name, ranks=preset_gpus(name)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "stage", "last"),
    [("turbos_560b", 1024, "pretraining", 896), ("nemotron3_super_120b", 512, None, 384)],
)
def test_a_large_cluster_is_as_planned(name, ranks, stage, last):
    found = trace(name, ranks, stage)
    assert [(entry.layout.ranks, entry.rank) for entry in found] == [(ranks, 0), (ranks, last)]
