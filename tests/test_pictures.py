"""Pictures on pages are those of the commands next to them: drawn again, their words and numbers are the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from amfm.launch.cli import run
from amfm.model.flops import count_parameters
from amfm.pretrain.config.file import load_config
from amfm.pretrain.report.numbers import short

ROOT = Path(__file__).parents[1]


def words(picture: Path) -> list[str]:
    """Texts of an SVG, in their order; a number of more than three digits in three, as processors differ in the last one."""
    texts = [
        "".join(node.itertext()).strip() for node in ElementTree.parse(picture).iter() if node.tag.endswith("text")
    ]
    return [re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.3g}", text) for text in texts]


@pytest.mark.slow
def test_the_readme_s_plan_is_that_of_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^amfm (plan .*--search) --write-layout$", page, re.MULTILINE)
    assert "](docs/images/plan.svg)" in page
    monkeypatch.chdir(ROOT)
    assert run([*shlex.split(command), "--picture", str(tmp_path / "plan.svg")]) == 0
    assert words(tmp_path / "plan.svg") == words(ROOT / "docs/images/plan.svg")


def test_the_readme_s_run_has_the_size_of_its_configuration() -> None:
    config = load_config(ROOT / "configs/tiny_cpu.yaml")
    train = config.train
    assert train.steps is not None
    size = short(count_parameters(config.model).total)
    tokens = short(train.steps * train.global_batch_size * train.sequence_length)
    (title,) = (text for text in words(ROOT / "docs/tiny_cpu.svg") if "parameters" in text)
    assert title.startswith(f"tiny_cpu: {size} parameters, {train.steps:,} steps, {tokens} tokens, validation loss ")
