"""Small tasks on made-up words, written as lm-eval reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
WRITE = {
    "output_type": "generate_until",
    "doc_to_text": "context",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
WEIGH = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "context",
    "metric_list": [{"metric": "bits_per_byte"}],
}


def write_task(folder: Path, name: str, kind: dict[str, Any], *, num_documents: int = 6, **changes: Any) -> str:
    """Write a task of a kind above with its own documents, and return its name."""
    words = [f"{first}{second}{third}" for first in "bdgk" for second in "aeo" for third in ("", "n", "st")]
    documents = [
        {
            "context": " ".join(words[index : index + 4 + index]) + ".",
            "choices": [f" {words[(index * 5 + step) % len(words)]}" for step in range(3)],
            "label": index % 3,
            "answer": words[index],
        }
        for index in range(num_documents)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    description = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **kind,
        **changes,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(description))
    return name
