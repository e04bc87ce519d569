"""Which delta mixers run as one operation; what it computes is in tests/kernels/interpreter/test_delta_block.py."""

from __future__ import annotations

import pytest
import torch

from amfm.model.build import build_mixer
from amfm.model.mixers.delta import DeltaBlock, DeltaNetMixer, KdaMixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from tests.model.mixers.samples import mixer_config


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "deltaproduct", "kda"])
def test_the_operation_has_the_parts_of_the_mixer(name: str) -> None:
    mixer = build_mixer(0, mixer_config(name, blocks=1), single_rank_groups(), "torch")
    assert isinstance(mixer, (DeltaNetMixer, KdaMixer))
    whole = mixer.shared_proj is not None
    widths = mixer.delta_sizes().widths(decay=not whole, gate=not whole)
    assert widths == mixer._cut_sizes
    assert mixer.at_once(torch.zeros(1, 2, sum(widths.values())), None, PackMeta.one_document_a_row(1, 2)) is None


def test_a_class_that_may_have_changed_a_part_runs_its_parts_in_turn() -> None:
    mixer = build_mixer(0, mixer_config("gated_deltanet", blocks=1), single_rank_groups(), "triton")
    assert isinstance(mixer, DeltaBlock)
    mixer.__class__ = type("Derived", (type(mixer),), {})
    projected = torch.zeros(1, 2, mixer.in_proj.weight.shape[0])
    assert mixer.at_once(projected, None, PackMeta.one_document_a_row(1, 2)) is None
