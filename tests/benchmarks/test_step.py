"""`python -m benchmarks.step`: the same model in all variants, each timed as it trains and with memory treated alike."""

from __future__ import annotations

import json

import pytest

from benchmarks.command import run
from benchmarks.freed_memory import KEPT, RETURNED
from benchmarks.step.__main__ import print_step_table, step
from benchmarks.step.bench import Shape, _as_trained, _check_losses, _summarize, bench_optimizers, bench_step
from tests.model.huggingface.cases import GRANITE

SMALL = Shape(rows=1, tokens=48, model=GRANITE)


def test_each_variant_is_held_against_the_default_with_memory_as_its_trainer_treats_it() -> None:
    taken = {RETURNED: (4.0, 2.0), KEPT: (3.0, 1.0)}
    names = ("transformers_default", "ours_fp32")
    figures = {
        each: _summarize({name: [9.0, value, 0.5] for name, value in zip(names, seconds, strict=True)}, SMALL)
        for each, seconds in taken.items()
    }
    assert figures[KEPT]["ours_fp32"]["ratio_to_transformers_default"] == 3.0
    assert figures[RETURNED]["ours_fp32"]["tokens_per_second"] == 48 / 2.0
    ours, theirs = (_as_trained(name, figures) for name in ("ours_fp32", "transformers_default"))
    assert ours is not None and theirs is not None
    assert (ours["seconds"], ours["ratio_to_transformers_default"]) == (1.0, 4.0)
    assert (theirs["seconds"], theirs["ratio_to_transformers_default"]) == (4.0, 1.0)


@pytest.mark.slow
def test_each_variant_is_timed_as_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["transformers_default", "ours_fp32"]
    said: list[str] = []
    result = bench_step(names, rounds=2, num_threads=1, report=said.append, shape=SMALL)
    assert said == [*(f"warming up {name}" for name in names), "round 1 of 2", "round 2 of 2"]
    assert result["hardware"]["threads"] == 1
    variants = result["variants"]
    assert len({round(variants[name]["first_loss"], 3) for name in names}) == 1
    returned, kept = (variants["transformers_default"]["memory"][each]["seconds"] for each in (RETURNED, KEPT))
    ours = variants["ours_fp32"]["memory"]
    assert variants["ours_fp32"]["as_trained"]["ratio_to_transformers_default"] == returned / ours[KEPT]["seconds"]
    assert variants["transformers_default"]["as_trained"]["ratio_to_transformers_default"] == 1
    assert ours[KEPT]["ratio_to_transformers_default"] == kept / ours[KEPT]["seconds"]
    assert ours[RETURNED]["tokens_per_second"] == 48 / ours[RETURNED]["seconds"]
    json.dumps(result)
    print_step_table(result)
    out = capsys.readouterr().out
    assert out.count("ours_fp32") == 3
    assert "transformers returns freed memory, ours keeps it" in out and "Freed memory kept" in out


@pytest.mark.slow  # the quick one is below: optimizers are compared under the same settings
def test_allocator_settings_of_the_environment_are_the_only_treatment_of_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    result = bench_step(["bare_loop"], rounds=1, num_threads=1, report=lambda _: None, shape=SMALL)
    assert list(result["variants"]["bare_loop"]["memory"]) == ["MALLOC_MMAP_MAX_"]
    assert result["variants"]["bare_loop"]["as_trained"] is None
    print_step_table(result)
    captured = capsys.readouterr()
    assert captured.out.count("bare_loop") == 1
    assert "memory is treated one way, as set in the environment by MALLOC_MMAP_MAX_" in captured.out + captured.err


@pytest.mark.slow
def test_muon_and_adamw_take_turns_at_steps_of_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    result = bench_optimizers(rounds=1, num_threads=1, micro_batches=2, report=lambda _: None, shape=SMALL)
    (taken, muon) = (result["variants"][name]["memory"] for name in ("ours_fp32", "ours_fp32_muon"))
    assert [*taken] == [*muon] == [*result["muon_to_adamw"]] == ["MALLOC_MMAP_MAX_"], "only the environment's settings"
    for treatment, ratio in result["muon_to_adamw"].items():
        assert ratio == muon[treatment]["seconds"] / taken[treatment]["seconds"]
        assert taken[treatment]["tokens_per_second"] == 2 * 48 / taken[treatment]["seconds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batches", "2"], "--micro-batches sets the step that --muon compares optimizers by"),
        (["--model", "some.yaml"], "--model sets the step that --muon compares optimizers by"),
        (["--muon", "--model", "none.yaml"], "none.yaml is not a configuration, run directory or weights folder"),
        (["--muon", "--compiled"], "--muon compares only our two optimizers"),
    ],
)
def test_flags_that_say_nothing_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(step, [*arguments]) == 2
    assert message in capsys.readouterr().err


def test_variants_that_are_not_the_same_model_are_refused() -> None:
    _check_losses({"ours_fp32": 4.0, "bare_loop": 4.00005, "ours_bf16": 4.3, "transformers_tuned": 4.2})
    with pytest.raises(RuntimeError, match="differ in their first loss by more than"):
        _check_losses({"ours_fp32": 4.0, "transformers_default": 4.001})
