"""Runs that cannot fit on a GPU are rejected with stage, parts and a layout that fits; near ones are not."""

import pytest

from amfm.launch.plan.gpu_fit import check_fits, local_gpu
from amfm.pretrain.checks.load import load_checked
from tests.launch.plan.presets import CONFIGS, H100, preset, preset_gpus

SMALL = H100.model_copy(update={"memory_gib": 9.0, "name": "a small GPU"})


def test_a_machine_without_cards_checks_nothing():
    assert local_gpu() is None


@pytest.mark.parametrize("name", ["ladder_1b_a300m", "granite4_h_small"])
def test_presets_pass_on_their_clusters(name):
    ranks = preset_gpus(name)
    check_fits(preset(name, ranks=ranks), ranks, H100)


def test_what_cannot_fit_is_refused_with_a_layout_that_does():
    config = preset("ladder_1b_a300m", "parallel.zero_stage=0", ranks=8)
    with pytest.raises(
        ValueError, match=r"zero_stage=0 .*on 8 x a small GPU needs .* GiB of 9\.0.*fits by the plan: .*--force"
    ):
        check_fits(config, 8, SMALL)


def test_a_later_stage_is_named_before_the_first_one_starts(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""extends: {CONFIGS}/ladder_1b_a300m.yaml
run: {{dir: run}}
train: {{steps: null, validate_every_steps: null}}
schedule: {{kind: constant, warmup_steps: 0, decay_steps: null}}
stages:
  - {{name: short, steps: 100}}
  - {{name: long, steps: 100, sequence_length: 524288, global_batch_size: 16}}
""",
        encoding="utf-8",
    )
    config = load_checked(path, (), world_size=8)
    with pytest.raises(ValueError, match=r"^stage long: .*most of it .*; fits by the plan: "):
        check_fits(config, 8, H100)
