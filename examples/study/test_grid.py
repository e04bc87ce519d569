"""The grid of a study: which patterns its axes make, and what is rejected before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from amfm_study.grid import expand_grid
from amfm_study.study import MixerConfig, Study, StudyConfig, TaskConfig, load_study

from amfm.launch.cli import run
from amfm.model.flops import count_parameters
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import resolved_yaml
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the run configuration of one task."""
    config = tiny_config(make_tiny_store(tmp_path / "data", num_documents=20), tmp_path / "unused")
    (tmp_path / "text.yaml").write_text(resolved_yaml(config))
    return tmp_path


def make_study(folder: Path, **settings: Any) -> Study:
    config: dict[str, Any] = {
        "dir": str(folder / "study"),
        "tasks": (TaskConfig(name="text", config="text.yaml"),),
        "mixers": (MixerConfig(mixer="M"),),
        "ratios": ("none", "3:1", "1:1", "all"),
        "num_mixers": 4,
    }
    return Study(StudyConfig(**(config | settings)), folder / "study.yaml", {})


def patterns(study: Study) -> dict[str, str]:
    return {cell.name: cell.config.model.pattern for cell in expand_grid(study)}


def test_each_ratio_becomes_whole_groups_that_end_in_attention(folder):
    assert patterns(make_study(folder)) == {
        "Mamba2-none-text-seed0": "M-M-M-M-",
        "Mamba2-3to1-text-seed0": "M-M-M-*-",
        "Mamba2-1to1-text-seed0": "M-*-M-*-",
        "attention-all-text-seed0": "*-*-*-*-",
    }
    assert [cell.attention_share for cell in expand_grid(make_study(folder))] == [0, 0.25, 0.5, 1]


def test_a_ratio_may_have_several_of_both_and_blocks_between(folder):
    both = (
        TaskConfig(name="text", config="text.yaml", between="E-"),
        TaskConfig(name="bare", config="text.yaml", between=""),
    )
    study = make_study(folder, tasks=both, ratios=("2:2",))
    assert patterns(study) == {"Mamba2-2to2-text-seed0": "ME-ME-*E-*E-", "Mamba2-2to2-bare-seed0": "MM**"}


def test_attention_alone_is_trained_once_for_all_mixers(folder):
    mixers = (MixerConfig(mixer="M"), MixerConfig(mixer="M", label="wide", overrides=("model.mamba.state_size=32",)))
    study = make_study(folder, mixers=mixers, ratios=("none", "all"), seeds=(0, 3))
    cells = {cell.name: cell for cell in expand_grid(study)}
    assert list(cells) == [
        *("Mamba2-none-text-seed0", "attention-all-text-seed0", "wide-none-text-seed0"),
        *("Mamba2-none-text-seed3", "attention-all-text-seed3", "wide-none-text-seed3"),
    ]
    assert [cells[name].config.train.seed for name in ("wide-none-text-seed0", "wide-none-text-seed3")] == [0, 3]
    sizes = [cell.config.model.mamba.state_size for cell in cells.values() if cell.config.model.mamba]
    assert sizes == [16, 16, 32, 16, 16, 32]


def test_cells_are_ordinary_runs_with_equal_tokens_in_folders_of_their_own(folder):
    cells = expand_grid(make_study(folder, threads_per_run=2))
    assert len({cell.config.run.dir for cell in cells}) == len(cells)
    assert all(cell.config.run.dir == str(folder / "study" / "runs" / cell.name) for cell in cells)
    assert {(cell.config.train.steps, cell.config.train.global_batch_size) for cell in cells} == {(4, 4)}
    assert {cell.config.train.num_threads for cell in cells} == {2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixers": (MixerConfig(mixer="nonesuch"),)}, "mixers.0.mixer = nonesuch: no mixer is called 'nonesuch'"),
        ({"mixers": (MixerConfig(mixer="?"),)}, "mixers.0.mixer = ?: pattern, character 1"),
        (
            {"mixers": (MixerConfig(mixer="*"),)},
            "mixers.0.mixer = *: is not a linear sequence mixer; attention comes with",
        ),
        ({"mixers": (MixerConfig(mixer="E"),)}, "mixers.0.mixer = E: is not a linear sequence mixer"),
        (
            {"mixers": (MixerConfig(mixer="M"), MixerConfig(mixer="M"))},
            "mixers = Mamba2: must differ; give each its own label",
        ),
        (
            {"tasks": (TaskConfig(name="text", config="text.yaml", between="M"),)},
            "tasks.0.between = M: must hold channel mixers only, and M is none; use -, E, or nothing",
        ),
        (
            {"ratios": ("6:1",)},
            "ratios.0 = 6:1: a group of 7 mixers does not fit num_mixers=4 a whole number of times; "
            "use 3:1 or 1:1, or num_mixers=7",
        ),
        ({"ratios": ("0:1",)}, "ratios.0 = 0:1: must be none, all, or LINEAR:ATTENTION in integers from 1"),
        ({"ratios": ("none", "none")}, "ratios = none: must differ; keep one"),
        ({"seeds": (1, 1)}, "seeds = 1: must differ; keep one"),
    ],
)
def test_axes_that_make_no_model_are_refused(folder, settings, message):
    with pytest.raises(ConfigError) as refused:
        expand_grid(make_study(folder, **settings))
    assert message in str(refused.value)


def test_a_broken_cell_is_named(folder):
    study = make_study(folder, mixers=(MixerConfig(mixer="M", overrides=("model.mamba.num_groups=3",)),))
    with pytest.raises(ConfigError, match=r"run Mamba2-none-text-seed0: .*num_groups=3 must divide"):
        expand_grid(study)


def test_text_without_a_held_out_part_has_no_loss_to_compare(folder):
    text = (folder / "text.yaml").read_text().replace("validation_fraction: 0.1", "validation_fraction: 0.0")
    (folder / "text.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=r"run Mamba2-none-text-seed0: data.validation_fraction = 0: a study compares"
    ):
        expand_grid(make_study(folder))


def test_a_study_file_is_read_with_places_overrides_and_near_misses(folder):
    path = folder / "study.yaml"
    path.write_text(
        "dir: out\ntasks:\n  - {name: text, config: text.yaml}\nmixers:\n  - {mixer: M}\nratios: [none, 3:1]\nnum_mixers: 4\n"
    )
    study = load_study(path, ["seeds=[4, 5]"])
    assert study.config.ratios == ("none", "3:1")
    assert {cell.seed for cell in expand_grid(study)} == {4, 5}
    path.write_text(path.read_text() + "sedes: [1]\n")
    with pytest.raises(ConfigError, match=r"study.yaml:8: sedes = \[1\]: unknown key; did you mean seeds\?"):
        load_study(path)
    path.write_text("dir: out\n")
    with pytest.raises(
        ConfigError, match="mixers: is missing; add `mixers:`, a list of sections, each with at least mixer"
    ):
        load_study(path)


def test_the_study_of_the_hybrid_ratio_compares_models_of_a_size_on_equal_tokens():
    cells = expand_grid(load_study(Path(__file__).parents[2] / "configs" / "studies" / "hybrid_ratio_1m.yaml"))
    assert len(cells) == 2 * 2 * (3 * 4 + 1)
    for task, low, high in (("text", 0.7e6, 1.1e6), ("recall", 0.1e6, 0.2e6)):
        own = [cell.config for cell in cells if cell.task == task]
        assert all(low < count_parameters(config.model).total < high for config in own)
        assert (
            len({(config.train.model_dump_json(exclude={"seed"}), config.data.model_dump_json()) for config in own})
            == 1
        )


def test_every_setting_is_documented():
    page = (Path(__file__).parent / "README.md").read_text()
    for prefix, schema in (("", StudyConfig), ("tasks.*.", TaskConfig), ("mixers.*.", MixerConfig)):
        for name, info in schema.model_fields.items():
            assert info.description, f"{prefix}{name} has no description"
            assert f"`{prefix}{name}`" in page or name in ("tasks", "mixers"), (
                f"examples/study/README.md lacks {prefix}{name}"
            )


def test_study_has_help_with_an_example(capsys):
    assert run(["study", "mixers", "--help"]) == 0
    assert "Example: amfm study mixers" in capsys.readouterr().out
