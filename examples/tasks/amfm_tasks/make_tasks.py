"""Small lm-eval tasks out of a store's held-out text, for machines without a hub and for a first look.

Three kinds, each a YAML file with its documents next to it: `NAME_continuation` chooses the words that follow a passage
among four, `NAME_next_word` writes the word that follows, `NAME_text` is the perplexity of passages. They show that a model
learns its text, and compare runs on one store; other benchmarks they do not replace.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer

CONTEXT_WORDS = 48
CHOICE_WORDS = 6
NUM_CHOICES = 4
PASSAGE_WORDS = 240
# A word with the blank space before it: pieces of a text that give it back.
WORD = re.compile(r"\s*\S+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class MadeTasks(NamedTuple):
    """Names of tasks, and the tokens of their longest answer: a model needs rows of as many."""

    names: list[str]
    longest_answer: int


def make_tasks(store: str | Path, out: str | Path, *, name: str | None = None, num_documents: int = 200) -> MadeTasks:
    """Write three tasks of up to `num_documents` documents each into a folder.

    `name`: what their names begin with; None: the last part of the store's path, or of its folder's where it is `store`.
    The same store gives the same files. Raises ValueError for a store without enough held-out words.
    """
    path = Path(store).absolute()
    prefix = name or (path.parent.name if path.name == "store" else path.name)
    if not NAME.fullmatch(prefix):
        raise ValueError(
            f"--name {prefix} must be letters, digits, _, - and . after a letter or digit; use for example text"
        )
    # Documents stand on their own lines.
    words = [word for text in held_out_texts(store) for word in WORD.findall("\n" + text.strip())]
    window = CONTEXT_WORDS + CHOICE_WORDS
    if len(words) < 2 * NUM_CHOICES * window:
        raise ValueError(
            f"the validation part of {store} has {len(words)} words, and tasks need {2 * NUM_CHOICES * window}; prepare it "
            "with a larger data.validation_fraction"
        )
    drawn = random.Random(0)
    starts = drawn.sample(range(len(words) - window), min(num_documents, len(words) // window))
    documents: dict[str, list[dict[str, Any]]] = {"continuation": [], "next_word": [], "text": []}
    for start in starts:
        context = "".join(words[start : start + CONTEXT_WORDS]).lstrip()
        follows = words[start + CONTEXT_WORDS : start + window]
        others = [drawn.randrange(len(words) - CHOICE_WORDS) for _ in range(NUM_CHOICES - 1)]
        choices = ["".join(words[other : other + CHOICE_WORDS]) for other in others]
        label = drawn.randrange(NUM_CHOICES)
        choices.insert(label, "".join(follows))
        documents["continuation"].append({"context": context, "choices": choices, "label": label})
        documents["next_word"].append({"context": context, "answer": follows[0].strip()})
    passages = range(0, len(words) - PASSAGE_WORDS + 1, PASSAGE_WORDS)
    documents["text"] = [
        {"text": "".join(words[start : start + PASSAGE_WORDS]).lstrip()} for start in [*passages][:num_documents] or [0]
    ]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    names = [_write_task(folder, f"{prefix}_{kind}", kind, records) for kind, records in documents.items()]
    tokenizer = load_tokenizer(store)
    answers = [choice for record in documents["continuation"] for choice in record["choices"]]
    return MadeTasks(names, max(len(tokenizer.encode(answer)) for answer in answers))


def held_out_texts(path: str | Path) -> Iterator[str]:
    """Yield the documents of a store's validation part as text. Raises ValueError for a store without a tokenizer."""
    tokenizer = load_tokenizer(path)
    store = TokenStore.open(path)
    for _, split, part in store.all_parts():
        if split != "validation":
            continue
        start = 0
        for stop in store.document_ends(part).tolist():
            ids = store.read_tokens(part, start, stop).tolist()
            yield tokenizer.decode([index for index in ids if index != tokenizer.eos_id])
            start = stop
    store.close()


def _write_task(folder: Path, task: str, kind: str, records: list[dict[str, Any]]) -> str:
    """Write TASK.jsonl and TASK.yaml, and return the task's name; the path in it is relative to where commands run."""
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    description = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
        **_KINDS[kind],
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    return task


_KINDS: dict[str, dict[str, Any]] = {
    "continuation": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "next_word": {
        "output_type": "generate_until",
        "doc_to_text": "context",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [
            {
                "name": "first_word",
                "filter": [{"function": "regex", "regex_pattern": r"(\S+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
}
