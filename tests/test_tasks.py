"""Twenty tasks that users look up: the answer is within two clicks of the index of pages."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "README.md"
MOST_CLICKS = 2
# Task -> page, and a pattern of its answer there.
TASKS = {
    "change the batch size": ("docs/batch_sizes.md", r"global_batch_size.*micro_batch_size"),
    "resume with other data": ("docs/checkpoints.md", r"What may change on resume"),
    "add a data set": ("docs/data.md", r"paths: \["),
    "evaluate while training": ("docs/evaluation.md", r"every_steps: \d+"),
    "log to Weights & Biases": ("docs/tracking.md", r"run\.wandb_project="),
    "use an own tokenizer": ("docs/data.md", r"## Tokenizers"),
    "export to vLLM": ("docs/export.md", r"vllm serve"),
    "find a NaN": ("docs/debugging.md", r"NaN"),
    "start on several nodes with torchrun": ("docs/launching.md", r"torchrun"),
    "add a mixer": ("docs/mixers.md", r"## Your own mixer"),
    "pick a layout": ("docs/layouts.md", r"## Start here"),
    "train on long sequences": ("docs/long_context.md", r"parallel\.context|context:"),
    "continue a Hugging Face checkpoint": ("docs/export.md", r"## Continue from a Hugging Face checkpoint"),
    "fit a scaling law": ("examples/study/README.md", r"(?i)scaling law|power law|\blaw\b"),
    "balance experts": ("docs/moe_balance.md", r"balanc"),
    "weight sources": ("docs/data.md", r"weight: ?[\d.]+"),
    "profile a step": ("docs/debugging.md", r"train\.profile"),
    "freeze parts": ("docs/optimizers.md", r"train\.freeze: \["),
    "average checkpoints": ("docs/checkpoints.md", r"## Merging"),
    "read from S3": ("docs/data.md", r"s3://"),
}


@cache
def count_clicks() -> dict[str, int]:
    """Clicks from the index to each page, by links in the pages."""
    clicks, waiting = {INDEX.resolve(): 0}, [INDEX.resolve()]
    for page in waiting:
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8")):
            found = (page.parent / target).resolve()
            if "://" not in target and found.exists() and found not in clicks:
                clicks[found] = clicks[page] + 1
                waiting.append(found)
    return {str(page.relative_to(ROOT)): number for page, number in clicks.items() if page.is_relative_to(ROOT)}


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_within_two_clicks(task: str) -> None:
    page, answer = TASKS[task]
    assert count_clicks()[page] <= MOST_CLICKS
    assert re.search(answer, (ROOT / page).read_text(encoding="utf-8"), re.DOTALL), f"{page} has no {answer}"
