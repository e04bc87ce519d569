"""Which settings a resume rejects, and the way on that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amfm.pretrain.checkpoint.compatibility import check_resumable, describe_raised_rate
from amfm.pretrain.checkpoint.manifest_file import checkpoint_name
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.file import load_config


def saved_at(base: Path, step: int, *overrides: str) -> dict[str, Any]:
    """The part of a manifest that judges settings."""
    config = load_config(base, list(overrides)).model_dump(mode="json")
    return {"identities": {}, "step": step, "config": config}


@pytest.mark.parametrize(
    "change", ["optimizer.learning_rate=5e-4", "train.global_batch_size=8", "schedule.min_ratio=0.2"]
)
def test_what_stages_can_change_is_refused_with_stages(base: Path, change: str) -> None:
    with pytest.raises(ValueError, match=r"declare stages: \[\{name: before, steps: 20\}"):
        check_resumable(saved_at(base, 20), load_config(base, [change]), {})


def test_the_stages_that_a_refusal_names_are_taken(base: Path) -> None:
    staged = ["train.steps=null", "stages=[{name: before, steps: 20}, {name: after, steps: 10, learning_rate: 5e-4}]"]
    config = load_config(base, staged)
    check_run(config, 1)
    assert any(change.startswith("train.steps") for change in check_resumable(saved_at(base, 20), config, {}))


def test_other_settings_are_refused_without_a_word_on_stages(base: Path) -> None:
    with pytest.raises(ValueError, match="Restore the value") as caught:
        check_resumable(saved_at(base, 20), load_config(base, ["model.hidden_size=48"]), {})
    assert "stages" not in str(caught.value)


def test_a_run_cannot_end_before_the_step_that_it_has_reached(base: Path) -> None:
    saved = saved_at(base, 22)
    with pytest.raises(ValueError, match=r"train.steps ends the run at step 20, and the checkpoint has done 22"):
        check_resumable(saved, load_config(base, ["train.steps=20"]), {})
    check_resumable(saved, load_config(base, ["train.steps=22"]), {})
    with pytest.raises(
        ValueError, match=r"stop_after_steps ends this start at step 10, .* 22 \(raise it, or leave it out"
    ):
        check_resumable(saved, load_config(base, ["train.stop_after_steps=10"]), {})
    check_resumable(saved, load_config(base, ["train.stop_after_steps=22"]), {})


def test_a_longer_schedule_names_both_rates_and_the_checkpoint_before_the_decay(base: Path, tmp_path: Path) -> None:
    def extended(steps: int, done: int, *overrides: str) -> str | None:
        saved = load_config(base, ["train.steps=60", *settings, *overrides])
        current = load_config(base, [f"train.steps={steps}", *settings, *overrides])
        return describe_raised_rate(
            saved, current, done, [tmp_path / checkpoint_name(step) for step in (60, 50, 40, 20)]
        )

    settings = ["optimizer.learning_rate=2e-3", "schedule.warmup_steps=5", "schedule.decay_steps=20"]
    said = extended(80, 60)
    assert said is not None and "step 61 runs at 1.9e-03, step 60 ran at 2.0e-04" in said
    assert f"at step 40: stop this, and amfm rollback {tmp_path.parent} --to 40." in said
    assert extended(80, 40) is None, "before the decay nothing bends"
    assert extended(60, 60) is None and extended(80, 60, "schedule.min_ratio=1.0") is None
    settings = ["schedule.kind=cosine", "schedule.warmup_steps=5"]
    assert "no older checkpoint has the same rate" in str(extended(80, 50))
