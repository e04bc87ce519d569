"""The pages for users of NeMo, Megatron-Bridge and torchtitan name fields that those published, once each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parents[3] / "docs"


def published(library: str) -> dict[str, set[str]]:
    """Fields by section."""
    text = (HERE / f"{library}_fields.txt").read_text(encoding="utf-8")
    lines = [line.partition(": ") for line in text.splitlines() if not line.startswith("#")]
    return {section: set(fields.split()) for section, _, fields in lines}


@pytest.mark.parametrize(
    ("library", "page", "least"), [("bridge", "from_nemo", 50), ("torchtitan", "from_torchtitan", 30)]
)
def test_each_field_of_the_page_was_published(library: str, page: str, least: int) -> None:
    sections = published(library)
    rows = [line for line in (DOCS / f"{page}.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`([a-z_0-9]+\.[a-z_0-9]+)`", row.split("|")[1])]
    assert len(named) >= least and len(named) == len(set(named))
    unknown = [name for name in named if name.partition(".")[2] not in sections.get(name.partition(".")[0], set())]
    assert unknown == []
