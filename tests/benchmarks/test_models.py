"""`python -m benchmarks.models`: which paths it takes, what it says of known times, its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.command import run
from benchmarks.models import compare, mixer_models, models


def test_each_step_is_held_against_the_first_model_of_its_own_round() -> None:
    found = compare([(1.0, 2.0), (2.0, 2.0), (1.0, 9.0)], [(0.5, 1.0), (1.0, 2.0), (0.4, 3.0)], tokens=100)
    assert found["ratio_cpu"] == 2.0 and found["ratio_cpu_max"] == pytest.approx(2.5)
    assert found["ratio_wall"] == 2.0 and found["tokens_per_cpu_second"] == 200.0


def test_two_models_are_timed_and_one_alone_is_refused(base: Path, tmp_path: Path, capsys) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(base.read_text().replace("hidden_size: 64", "hidden_size: 32"))
    sizes = ["--rows", "1", "--tokens", "16", "--rounds", "1"]
    assert run(models, [str(base), str(small), *sizes, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["models"]
    assert first["ratio_cpu"] == 1.0 and second["parameters"] < first["parameters"]
    assert run(models, [str(base)]) == 2
    assert "compares two or more models" in capsys.readouterr().err
    assert run(models, [str(base), str(tmp_path / "none")]) == 2
    assert "is not a configuration, run directory or weights folder" in capsys.readouterr().err


def test_mixers_of_equal_sizes_stand_beside_each_other(capsys) -> None:
    sizes = ["--rows", "1", "--tokens", "16", "--rounds", "1"]
    assert run(models, ["--mixers", "G,K", *sizes, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["models"]
    assert (first["model"], second["model"]) == ("gated deltanet", "kda")
    gated, kda = mixer_models("G,K").values()
    sections = [getattr(gated.mixers, "gated_deltanet"), getattr(kda.mixers, "kda")]  # noqa: B009
    assert len({(section.num_heads, section.head_dim, section.value_dim()) for section in sections}) == 1
    for arguments, message in (
        (["--mixers", "G"], "compares two or more models, and gated deltanet is one"),
        (["--mixers", "G,K", "some.yaml"], "--mixers names what is compared, and so does some.yaml"),
        ([], "none is named; name two, or --mixers G,K"),
        (["--mixers", "G,E"], "mixes no tokens along the row"),
    ):
        assert run(models, [*arguments]) == 2
        assert message in capsys.readouterr().err
