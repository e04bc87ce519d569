"""The files of an export folder: sharded weights, configuration, generation settings, model card.

An export is one folder that `from_pretrained` loads: `model.safetensors` (or shards with an index), `config.json`,
`generation_config.json`, the tokenizer's files and README.md. `amfm_model.json` next to them is our own description of
the model, for a later import: some settings have no field in config.json. The class `own` brings its Python files along.

The folder is written under a hidden temporary name next to its place (`begin_export`), so the final rename stays inside
one file system and is atomic; `put_in_place` does it once the caller is satisfied. Weights are written in float32, the
dtype of the master weights, so that an import of an export gives equal bits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import amfm.pretrain.export.modeling_template
from amfm.data_pipeline.durable.files import delete, named, sync, take_lock, try_to_delete
from amfm.data_pipeline.tokenizer.id_vocabulary import IdVocabulary
from amfm.model.config.kinds import describe_symbol
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters
from amfm.model.huggingface.classes import (
    NATIVE_TARGETS,
    WRITTEN,
    TokenIds,
    explain_unfit,
    huggingface_config,
    weight_map,
)
from amfm.model.huggingface.hf_class import HfTarget, Target
from amfm.model.on_demand import Shape, on_demand
from amfm.pretrain.export.plugin_files import PLUGIN_FOLDER, export_refusals, is_served, write_plugin
from amfm.pretrain.export.tokenizer import OUR_DESCRIPTION, write_tokenizer
from amfm.pretrain.inference.released import Released
from amfm.pretrain.inference.weights import Weights
from amfm.pretrain.tensor_files import TensorWriter

# Name of a temporary folder: `delete` rejects any other.
UNFINISHED = re.compile(r"\..+\.amfm-export", re.DOTALL)
LOCK = re.compile(r"\..+\.amfm-export-lock", re.DOTALL)
MAX_SHARD_BYTES = 4_000_000_000
TEMPLATE = amfm.pretrain.export.modeling_template.__name__
TEMPLATE_FILES = (
    "configuration_amfm.py",
    "modeling_amfm.py",
    "cache_amfm.py",
    "documents_amfm.py",
    "first_values_amfm.py",
    "blocks_amfm.py",
    "streams_amfm.py",
    "rotary_amfm.py",
    "indexer_amfm.py",
    "attention_amfm.py",
    "mixers_amfm.py",
    "linear_mixers_amfm.py",
    "delta_mixers_amfm.py",
)


@dataclass(frozen=True)
class ExportPlan:
    """What is exported and as what: the model, the target class, tokens per sequence, and the bytes of a shard at most.

    left_out: why the MTP layers of the model that was trained are not in `weights`.
    """

    weights: Weights
    target: Target
    max_position_embeddings: int
    max_shard_bytes: int = MAX_SHARD_BYTES
    left_out: str | None = None

    @property
    def hf_class(self) -> HfTarget:
        """The class of transformers that is written."""
        return WRITTEN[self.target]

    @property
    def token_ids(self) -> TokenIds:
        """Ids of the begin, end and padding tokens; None if the tokenizer has none."""
        tokenizer = self.weights.vocabulary
        return TokenIds(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)

    def unfit_reasons(self) -> list[str]:
        """Why the target is not a native class; empty when it is one."""
        if not self.hf_class.ships_code:
            return []
        fitting = [target for target in NATIVE_TARGETS if not explain_unfit(self.weights.model, target)]
        if fitting:
            return [f"export target own was asked for, though {fitting[0]} holds this model"]
        reasons = [explain_unfit(self.weights.model, target) for target in NATIVE_TARGETS]
        # Of classes with such layers, if there are any: others are further away.
        near = [found for found in reasons if not found[0].startswith("model.pattern=")]
        return ["; ".join(found) for found in near or reasons]

    def refusals(self) -> list[str]:
        """Programs that are known to reject this export, with rule and fix."""
        return [str(found) for found in export_refusals(self.weights.model, self.target, self.weights.vocabulary.kind)]


def write_export(plan: ExportPlan, folder: Path) -> None:
    """Write every file of the export into an existing empty folder; durability is the caller's (`sync_files`).

    Raises ValueError for a tokenizer that cannot be expressed as tokenizer.json.
    """
    write_shards(plan, folder)
    config = huggingface_config(
        plan.weights.model, plan.target, plan.token_ids, max_position_embeddings=plan.max_position_embeddings
    )
    released = plan.weights.released or Released()
    write_json(folder / "config.json", config | released.token_ids)
    ids = plan.token_ids
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    generation: dict[str, Any] = {name: value for name, value in special.items() if value is not None}
    sampling = released.generation or {"do_sample": True, "temperature": 1.0}
    write_json(folder / "generation_config.json", generation | released.token_ids | sampling)
    write_tokenizer(plan.weights.vocabulary, folder, released, max_length=plan.max_position_embeddings)
    write_json(
        folder / OUR_DESCRIPTION,
        {"origin": plan.weights.origin, "target": plan.target, "model": plan.weights.model.model_dump(mode="json")},
    )
    if plan.hf_class.ships_code:
        template = Path(amfm.pretrain.export.modeling_template.__file__).parent
        for name in TEMPLATE_FILES:
            (folder / name).write_text((template / name).read_text(encoding="utf-8"), encoding="utf-8")
        write_package_mixers(plan.weights.model, folder)
        mark_configuration(folder)
        write_plugin(plan.weights.model, folder)
    (folder / "README.md").write_text(model_card(plan), encoding="utf-8")


def write_package_mixers(model: ModelConfig, folder: Path) -> None:
    """Write the forms of a model's mixers, router and head of packages, as modeling files next to ours, and the table that names them."""
    routers = [moe.package_router() for _, moe in model.expert_sections() if model.routed_experts()]
    used = {kind.base: kind.modeling for kind, _ in model.kinds_in_use() if kind.modeling}
    tables = {
        "PACKAGE_MIXERS": {name: named for name, named in used.items() if name != model.head},
        "PACKAGE_HEADS": {name: named for name, named in used.items() if name == model.head},
        "PACKAGE_ROUTERS": {router.name: router.modeling for router in routers if router is not None},
    }
    forms = {named: named.split(":") for table in tables.values() for named in table.values()}
    lines = ['"""Mixers, routers and heads of packages by name."""', ""]
    lines += [f"from .{module.rpartition('.')[2]} import {form}" for module, form in forms.values()]
    for title, table in tables.items():
        lines += ["", f"{title} = {{", *(f'    "{name}": {forms[named][1]},' for name, named in table.items()), "}"]
    (folder / "package_mixers_amfm.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for module in dict.fromkeys(module for module, _ in forms.values()):
        found = importlib.util.find_spec(module)
        assert found is not None and found.origin is not None, f"{module} is of an installed package"
        text = Path(found.origin).read_text(encoding="utf-8").replace(f"from {TEMPLATE}.", "from .")
        (folder / Path(found.origin).name).write_text(text, encoding="utf-8")


def mark_configuration(folder: Path) -> None:
    """Let the configuration's file differ where any modeling file does.

    transformers keeps a folder's model class by its configuration class, which it keeps by that file alone: a process that reads
    two exports would build the second with the files of the first.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*_amfm.py")))).hexdigest()
    with (folder / "configuration_amfm.py").open("a", encoding="utf-8") as file:
        file.write(f"\n# Of the modeling files with SHA-256 {digest}.\n")


def write_shards(plan: ExportPlan, folder: Path) -> None:
    """Write float32 weights as safetensors: one file, or several of at most `max_shard_bytes` and their index.

    Tensors are converted piece by piece and go to their places as they come: memory holds some blocks of rows.
    """
    state = on_demand(plan.weights.state)
    mapping = weight_map(plan.weights.model, plan.target)
    shapes = mapping.their_shapes({name: state.shape(name) for name in state})
    shards = list(plan_shards(shapes, plan.max_shard_bytes))
    index: dict[str, str] = {}
    writers: dict[str, TensorWriter] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        writer = TensorWriter(folder / file, {name: (torch.float32, shapes[name]) for name in sorted(names)})
        writers |= dict.fromkeys(names, writer)
        index |= dict.fromkeys(names, file)
    for name, first_row, rows in mapping.stream_theirs(state):
        writers[name].put(name, first_row, rows)
    for writer in writers.values():
        writer.finish()
    if len(shards) > 1:
        total = sum(math.prod(shape) * 4 for shape in shapes.values())
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
        )


def plan_shards(shapes: Mapping[str, Shape], max_bytes: int) -> Iterator[list[str]]:
    """Divide the tensors' names, in order, such that no shard exceeds `max_bytes` in float32 unless a single tensor does."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * 4
        if names and size + num_bytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON with a newline at its end; asserts that no number is NaN or infinite, which JSON cannot spell."""
    assert not any(isinstance(item, float) and not math.isfinite(item) for item in value.values()), str(path)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def sync_files(folder: Path) -> None:
    """Force every file of a folder, its folders, and itself to the disk.

    Reverse order puts what is in a folder before the folder, whose entries must not outlive their content.
    """
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def begin_export(out: Path) -> Iterator[Path]:
    """Make an empty folder next to OUT to write into; what a killed export left there is removed.

    After the block it is gone, unless it got its name: half an export must not keep a full disk full. Errors of the system
    carry its path. Raises RuntimeError while another process writes to OUT.
    """
    out = out.resolve()  # a link to an empty folder stays, and its folder is replaced
    temporary = out.with_name(f".{out.name}.amfm-export")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with hold_place(out, temporary.with_suffix(".amfm-export-lock")):
        delete(temporary, UNFINISHED)
        temporary.mkdir()
        try:
            with named(temporary):
                yield temporary
        finally:
            try_to_delete(temporary, UNFINISHED)


@contextmanager
def hold_place(out: Path, path: Path) -> Iterator[None]:
    """Hold the lock file `path` of a folder to be written, and remove it at the end. Raises RuntimeError if another process holds it."""
    lock = None
    while lock is None:
        lock = take_lock(path, wait=False)
        if lock is None:
            raise RuntimeError(f"another process is writing {out}; wait for it, or name another folder")
        try:
            is_current = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except FileNotFoundError:
            is_current = False
        if not is_current:  # the one before removed this file after it was opened here
            lock.close()
            lock = None
    with lock:
        try:
            yield
        finally:
            try_to_delete(path, LOCK)


def put_in_place(temporary: Path, out: Path) -> None:
    """Rename a finished folder to OUT, where an empty folder may be, and make the name durable.

    Raises OSError when something was put into OUT meanwhile.
    """
    out = out.resolve()
    if out.exists():
        out.rmdir()
    os.rename(temporary, out)
    sync(out.parent)


TEXT_EXAMPLE = """tokenizer = AutoTokenizer.from_pretrained(path{remote})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""
SPECIAL_TOKENS = (
    "Special tokens such as the end of a text are single tokens where they are written out. In pretraining they were plain "
    "text there; `tokenizer(text, split_special_tokens=True)` gives that."
)


def model_card(plan: ExportPlan) -> str:
    """Compose README.md: what the model is, how to load it, and why it has the class that it has."""
    config = plan.weights.model
    counts = count_parameters(config)
    remote = ", trust_remote_code=True" if plan.hf_class.ships_code else ""
    has_text = plan.weights.vocabulary.kind != IdVocabulary.kind
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(_kinds(config))}, hybrid, amfm]",
        "---",
        "",
        f"# {plan.hf_class.class_name} pretrained with amfm",
        "",
        f"A base language model of {counts.total:,} parameters ({counts.active:,} active a token), not tuned to follow "
        "instructions.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(plan, config)),
        "",
        "```python",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_text else ''}",
        "",
        'path = "."  # this folder',
        f"model = AutoModelForCausalLM.from_pretrained(path{remote})",
        *(TEXT_EXAMPLE.format(remote=remote).splitlines() if has_text else ()),
        "```",
        "",
        "Weights are float32. Router, decay and time step are sensitive to rounding: in bf16 some tokens choose other "
        "experts than in float32.",
        "",
        SPECIAL_TOKENS if has_text else "It was trained on token ids, and the folder has no tokenizer.",
    ]
    for remark in plan.hf_class.remarks(config):
        lines += ["", remark]
    if plan.left_out is not None:
        lines += ["", f"Of the trained model {plan.left_out}."]
    if plan.hf_class.ships_code and is_served(config):
        serving = "brings a plug-in, which needs no installation; written for vLLM 0.32"
        lines += [
            "",
            f"vLLM: this folder {serving}.",
            "",
            f"```\nPYTHONPATH=$PWD/{PLUGIN_FOLDER} vllm serve . --enforce-eager\n```",
        ]
    limits = plan.hf_class.limits(config)
    if limits:
        lines += ["", "## What the class does not do", "", *(f"- {limit}" for limit in limits)]
    reasons = plan.unfit_reasons()
    if reasons:
        lines += ["", "## Why no native class", "", *(f"- {reason}" for reason in reasons)]
    refusals = plan.refusals()
    if refusals:
        lines += ["", "## Programs known to reject it", "", *(f"- {refusal}" for refusal in refusals)]
    return "\n".join(lines) + "\n"


def _kinds(config: ModelConfig) -> list[str]:
    """Kinds of block as tags."""
    symbols = config.parsed_pattern.counts()
    return [describe_symbol(symbol).lower().replace(" ", "-") for symbol in symbols]


def _facts(plan: ExportPlan, config: ModelConfig) -> list[tuple[str, str]]:
    """Rows of the model card's table: sizes, origin and, for a model of a run, steps and tokens."""
    pattern = config.parsed_pattern
    kinds = ", ".join(f"{symbol} {describe_symbol(symbol)}" for symbol in pattern.counts())
    facts = [
        ("Blocks", f"`{''.join(pattern.letters)}` ({kinds})"),
        ("Hidden size", str(config.hidden_size)),
        ("Vocabulary", str(config.vocab_size)),
        ("Trained at", f"{plan.weights.trained_length() or plan.max_position_embeddings} tokens per sequence"),
        ("From", f"`{plan.weights.origin}`"),
    ]
    return [*facts, *_training_record(plan.weights)]


def _training_record(weights: Weights) -> list[tuple[str, str]]:
    """Rows of the model card's table on the run that made the model; none for an import."""
    run = weights.run
    if run is None:
        return []
    facts = [("Training", f"{weights.step:,} steps, {weights.tokens:,} tokens, {run.train.precision}")]
    facts.append(("Text", ", ".join(source.name for source in run.data.sources)))
    name = {"adamw": "AdamW", "muon": "Muon with AdamW"}.get(run.optimizer.kind, run.optimizer.kind)
    if run.optimizer.muon is not None and run.optimizer.muon.rule != "muon":
        name = f"Muon ({run.optimizer.muon.rule}) with AdamW"
    rate = f"{name}, peak rate {run.optimizer.learning_rate:g}, schedule {run.schedule.kind}"
    facts.append(("Optimizer", f"{rate}, {run.train.global_batch_size} sequences per step"))
    if weights.validation_loss is not None:
        facts.append(("Validation loss", f"{weights.validation_loss:.4f} nats per token"))
    return facts
