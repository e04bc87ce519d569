"""Published speeds beside the plan's: the stand-in for a foreign model, and the table of the documentation."""

import json
from pathlib import Path

import pytest

from launch.bench.published import plan_anchors
from launch.cli import run
from model.flops import count_parameters, flops_per_token
from pretrain.checks.check_run import load_checked

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"


def test_the_stand_in_for_deepseek_v3_has_its_size_and_arithmetic():
    model = load_checked(CONFIGS / "anchors" / "deepseek_v3_like.yaml").model
    # arXiv 2412.19437, section 4.2: 61 layers of width 7,168, 128 heads; latent widths 1,536 and 512, heads of 128 + 64.
    latent = 7168 * (1536 + 512 + 64) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    scores = 2 * (4096 + 1) / 2 * 128 * (192 + 128)
    theirs = 3 * 61 * (2 * latent + scores)
    assert flops_per_token(model, 4096)["attention"] == pytest.approx(theirs, rel=5e-3)
    counts = count_parameters(model)
    assert counts.total == pytest.approx(671e9, rel=5e-3)
    # 37B and what grouped-query projections have beyond latent ones.
    assert counts.active == pytest.approx(37e9 + 61 * 25.7e6, rel=2e-2)


def test_the_documentation_holds_what_the_command_prints():
    text = (ROOT / "docs" / "benchmarks" / "planning.md").read_text(encoding="utf-8")
    rows = plan_anchors(CONFIGS)
    assert [row["name"] for row in rows].count("DeepSeek-V3") == 2
    for row in rows:
        assert f"{row['predicted_tokens_per_second_per_gpu']:,.0f} ({row['error']:+.0%})" in text, row
        assert f"{row['published_tokens_per_second_per_gpu']:,}" in text


def test_the_table_of_anchors(capsys):
    assert run(["bench", "plan", str(CONFIGS)]) == 0
    captured = capsys.readouterr()
    assert "16,789" in captured.out
    assert "DeepSeek-V3," in captured.out
    assert "the preset's attention is not the model's" in captured.err
    assert run(["bench", "plan", str(CONFIGS), "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert row["error"] == pytest.approx(
            row["predicted_tokens_per_second_per_gpu"] / row["published_tokens_per_second_per_gpu"] - 1
        )


def test_a_folder_without_presets_is_refused(capsys, tmp_path):
    assert run(["bench", "plan", str(tmp_path)]) == 2
    assert "nemotron3_nano_30b.yaml" in capsys.readouterr().err
