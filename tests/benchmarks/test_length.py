"""`python -m benchmarks.length`: which mixers and lengths it takes, what it says of rates that are known, its JSON."""

from __future__ import annotations

import json

import pytest

from amfm.model.config.kinds import registered_kinds
from amfm.model.config.pattern import parse_pattern
from benchmarks.command import run
from benchmarks.length import choose_mixers, length, length_config, steadier_clock, summarize


def steps(*cpu_seconds: float, waiting: float = 1.0) -> list[dict[str, float]]:
    """Steps of so much CPU time each, and wall time as long."""
    return [{"cpu": seconds, "wall": seconds * waiting} for seconds in cpu_seconds]


def test_every_registered_mixer_and_attention_has_a_model_to_time() -> None:
    symbols = choose_mixers(None)
    assert len(symbols) == len(registered_kinds()) + 2
    for symbol in symbols:
        assert parse_pattern(length_config(symbol).pattern).letters == (symbol,)


def test_mixers_go_by_letter_and_by_name() -> None:
    assert choose_mixers("M, mamba,attention,gla,{gla},gated_deltanet,G,*") == ["M", "*", "{gla}", "G"]


def test_rates_are_held_against_the_shortest_rows_of_their_own_round() -> None:
    # The second round is twice as slow at every length: ratios do not see it.
    found = summarize({4: steps(1.0, 2.0, 1.0), 8: steps(1.1, 2.2, 1.1), 16: steps(1.25, 2.5, 1.2)}, "cpu")
    assert [row["ratio"] for row in found["rows"]] == pytest.approx([1.0, 1 / 1.1, 1 / 1.25])
    assert found["rows"][2]["ratio_max"] == pytest.approx(1 / 1.2)
    assert [row["tokens_per_second"] for row in found["rows"]] == pytest.approx([16.0, 16 / 1.1, 16 / 1.25])
    assert found["furthest_ratio"] == pytest.approx(0.8)
    assert found["mark"] == "falls"


@pytest.mark.parametrize(("seconds", "mark"), [(1.17, "flat"), (1.19, "falls"), (0.88, "flat"), (0.86, "rises")])
def test_more_than_fifteen_percent_is_marked(seconds: float, mark: str) -> None:
    assert summarize({4: steps(1.0), 8: steps(seconds)}, "cpu")["mark"] == mark


def test_a_length_in_the_middle_counts_too() -> None:
    assert summarize({4: steps(1.0), 8: steps(1.3), 16: steps(1.0)}, "cpu")["mark"] == "falls"


def test_the_clock_whose_rounds_differ_less_judges() -> None:
    noisy_wall = [{"cpu": 1.0, "wall": 1.0}, {"cpu": 1.01, "wall": 3.0}]
    assert steadier_clock({"gla": {4: noisy_wall, 8: noisy_wall}}) == "cpu"
    swapped = [{"cpu": step["wall"], "wall": step["cpu"]} for step in noisy_wall]
    assert steadier_clock({"gla": {4: swapped, 8: swapped}}) == "wall"


def test_tiny_rows_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--mixers", "M,*", "--lengths", "96,32", "--rounds", "1", "--json"]
    assert run(length, command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["lengths"] == [32, 96]
    assert result["tokens_a_step"] == 96
    assert result["judged_by"] in ("cpu", "wall")
    assert result["hardware"]["threads"] == 1
    assert list(result["mixers"]) == ["mamba", "attention"]
    for figures in result["mixers"].values():
        assert [row["length"] for row in figures["rows"]] == [32, 96]
        assert figures["rows"][0]["ratio"] == figures["rows"][0]["ratio_min"] == 1.0
        assert all(row["tokens_per_cpu_second"] > 0 and row["tokens_per_wall_second"] > 0 for row in figures["rows"])
        assert figures["mark"] in ("flat", "falls", "rises")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixers", "M,E"], "--mixers E: mixture of experts mixes no tokens along the row"),
        (["--mixers", "glaa"], "no mixer is called 'glaa'"),
        (["--lengths", "1024,3000"], "must be two or more that divide the longest"),
        (["--lengths", "1024"], "must be two or more that divide the longest"),
        (["--lengths", "1K,2K"], "must be integers with commas between"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_timed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(length, arguments) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert "1 of " not in captured
