"""Inspect a folder that amfm wrote: its kind, whether it is whole, and what it holds.

How it works: the kind (token store, teacher's store, checkpoint, run, import, export) follows from the files that are
there; each kind has a function that reads everything, verifies the checksums it carries and returns an `Inspection`.
Problems are collected and not raised, so that one damaged file does not hide the next. Two folders are compared by
their inspections; two whole checkpoints number by number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.json_files import read_object, take
from amfm.data_pipeline.terminal import Report, silent

# Events that someone who looks at a run should know of.
WARNINGS = {"experts_collapsed", "unbalanced_experts", "rolled_back", "gave_up", "failed"}


@dataclass(frozen=True)
class Inspection:
    """Result of an inspection: `kind`, every `problem` (none: all checksums hold), and facts by name.

    `details` holds what is compared but too long to print: settings and a digest of each tensor.
    """

    kind: str
    problems: tuple[str, ...]
    facts: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)

    def is_ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """The inspection as JSON values, without details."""
        return {"kind": self.kind, "ok": self.is_ok(), "problems": list(self.problems), **self.facts}


def inspect_path(path: str | Path, *, quick: bool = False, report: Report = silent) -> Inspection:
    """Inspect a folder, or a token store at a URL: read everything and verify checksums.

    `quick`: of a store only sizes, and of a token store indices and document ends. Raises FileNotFoundError if it does not exist,
    ValueError if it is nothing that amfm writes, or for `quick` of anything but a store.
    """
    from amfm.data_pipeline.store.object_store import is_url

    if is_url(str(path)):
        return inspect_store(str(path), quick=quick, report=report)
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}; name the folder of a store, checkpoint, run or export")
    manifest = folder / "manifest.json"
    if manifest.is_file():
        with manifest.open("rb") as file:
            head = file.read(200)
        if b"amfm-teacher-store" in head:
            return inspect_teacher(folder, quick=quick, report=report)
        if b"amfm-checkpoint" not in head:
            return inspect_store(str(folder), quick=quick, report=report)
    if quick:
        raise ValueError(f"{folder} is not a store, and --quick is for stores; leave it out")
    if manifest.is_file():
        return inspect_checkpoint(folder, report)
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        return inspect_run(folder, report)
    if (folder / "weights.json").is_file():
        return inspect_weights(folder, report)
    if (folder / "config.json").is_file():
        return inspect_export(folder, report)
    raise ValueError(
        f"{folder} is not a token store, teacher store, checkpoint, run, import or export (none of manifest.json, config.yaml, "
        "weights.json, config.json is in it); name such a folder"
    )


def inspect_store(path: str, *, quick: bool = False, report: Report = silent) -> Inspection:
    """Inspect a token store in a folder or at a URL.

    Verifies manifest, tokenizer, sizes, document ends and, unless `quick`, every chunk and digest.
    """
    from amfm.data_pipeline.store.shards import DamagedError
    from amfm.data_pipeline.store.store import TokenStore
    from amfm.data_pipeline.verify import verify_store

    problems = verify_store(path, full=not quick, report=report)
    try:
        store = TokenStore.open(path)
    except DamagedError:
        return Inspection("token store", tuple(problems), {})
    parts = list(store.all_parts())
    facts = {
        "verified": "sizes, indices and document ends" if quick else "every chunk, digest and document end",
        "identity": store.identity(),
        "tokenizer": store.tokenizer_identity,
        "vocab_size": store.vocab_size,
        "dtype": store.layout.dtype,
        "preset": store.layout.preset,
        **({"revisions": store.revisions} if store.revisions else {}),
        "parts": len(parts),
        "tokens": sum(part.num_tokens for _, _, part in parts),
        "documents": sum(part.num_documents for _, _, part in parts),
        "sources": {
            name: {split: store.num_tokens(name, split) for split in ("train", "validation")}
            for name in store.source_names
        },
    }
    store.close()
    return Inspection("token store", tuple(problems), facts, {part.path: part.digest for _, _, part in parts})


def inspect_teacher(folder: Path, *, quick: bool = False, report: Report = silent) -> Inspection:
    """Inspect a store that `amfm distill store` wrote: whose probabilities it holds, and every sample's checksum."""
    from amfm.pretrain.distillation.write import inspect_teacher_store

    problems, facts, details = inspect_teacher_store(folder, quick=quick, report=report)
    return Inspection("teacher store", tuple(problems), facts, details)


def inspect_checkpoint(folder: Path, report: Report = silent) -> Inspection:
    """Inspect a checkpoint: its manifest, the SHA-256 of every file, and every tensor for NaN."""
    from amfm.pretrain.checkpoint.inspect import inspect_checkpoint as inspect

    found = inspect(folder, report)
    facts = {name: value for name, value in found.items() if name not in ("kind", "path", "ok", "problems")}
    return Inspection("checkpoint", tuple(found["problems"]), facts)


def mark_checkpoint(folder: Path, protect: bool) -> None:
    """Mark a checkpoint to be kept, or remove the mark, of its copy in the run's store too.

    Raises ValueError if it does not verify: a mark must not protect what cannot be loaded.
    """
    from amfm.pretrain.checkpoint.commit import mark, release
    from amfm.pretrain.checkpoint.files import verify_checkpoint
    from amfm.pretrain.checkpoint.remote import RemoteCheckpoints
    from amfm.pretrain.config.file import load_config

    manifest, problems = verify_checkpoint(folder)
    if manifest is None or (protect and problems):
        raise ValueError(f"--protect marks a checkpoint that verifies, and {folder} does not: {'; '.join(problems)}")
    settings = folder.absolute().parents[1] / "config.yaml"
    if protect:
        mark(folder)
        return
    store = load_config(settings).train.checkpoint_store if settings.is_file() else None
    if store is not None:  # whose copy would stay marked
        RemoteCheckpoints(store).release(folder.name)
    release(folder)


def inspect_run(folder: Path, report: Report = silent) -> Inspection:
    """Inspect a run directory: verify every checkpoint, and find how far the metrics reach."""
    from amfm.pretrain.checkpoint.files import verify_checkpoint
    from amfm.pretrain.checkpoint.manifest_file import list_checkpoints
    from amfm.pretrain.config.file import flatten, load_config
    from amfm.pretrain.launcher_protocol import read_events
    from amfm.pretrain.report.data import read_json_lines
    from amfm.pretrain.stages import total_steps

    problems, steps = [], []
    tokenizer = None
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        manifest, found = verify_checkpoint(checkpoint, report)
        problems += found
        if manifest is not None and not found:
            steps.append(manifest["step"])
            tokenizer = tokenizer or manifest["identities"].get("tokenizer")
    facts: dict[str, Any] = {"checkpoints": steps} | ({"tokenizer": tokenizer} if tokenizer else {})
    details: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        config = load_config(folder / "config.yaml")
        facts |= {"pattern": config.model.pattern, "steps": total_steps(config)}
        details = flatten(config.model_dump(mode="json"))
    if (folder / "metrics.jsonl").is_file():
        lines, notes = read_json_lines(folder / "metrics.jsonl")
        last = lines[-1] if lines else {}
        facts |= {"last_step": last.get("step"), "loss": last.get("loss"), "notes": notes}
        validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
        facts |= {"validation_loss": validated[-1]} if validated else {}
    if warned := sorted({str(event.get("event")) for event in read_events(folder)} & WARNINGS):
        facts["warnings"] = warned
    return Inspection("run", tuple(problems), facts, details)


def inspect_weights(folder: Path, report: Report = silent) -> Inspection:
    """Inspect imported weights: the SHA-256 of every file, and every tensor against the configuration."""
    from amfm.pretrain.config.file import flatten
    from amfm.pretrain.inference.weights import read_weights

    facts: dict[str, Any] = {}
    try:
        description = read_object(folder / "weights.json")
        facts["origin"] = description.get("origin")
        weights = read_weights(folder, report)
    except (ValueError, RuntimeError) as error:
        return Inspection("imported weights", (str(error),), facts)
    facts |= {
        "pattern": weights.model.pattern,
        "parameters": weights.num_parameters(),
        "tensors": len(weights.state),
        "tokenizer": weights.vocabulary.identity(),
    }
    details = flatten(weights.model.model_dump(mode="json"), "model") | description["sha256"]
    return Inspection("imported weights", (), facts, details)


def inspect_export(folder: Path, report: Report = silent) -> Inspection:
    """Inspect a transformers export: config.json, and every tensor of every safetensors file, against the index.

    These files carry no checksums, so values are tested for NaN and infinity, and digests are made for comparison.
    """
    from amfm.pretrain.tensor_files import TensorFile, tensor_bytes

    config = read_object(folder / "config.json")
    problems, tensors, parameters, num_bytes = [], {}, 0, 0
    files = sorted(folder.glob("*.safetensors"))
    total_bytes = sum(path.stat().st_size for path in files)
    if not files:
        problems.append(f"{folder} holds no .safetensors file")
    for path in files:
        report(f"reading {folder}", num_bytes, total_bytes)
        num_bytes += path.stat().st_size
        try:
            opened = TensorFile(path).on_demand()
            for name, source in opened.sources.items():
                digest, is_finite = hashlib.sha256(), True
                for _, rows in opened.blocks(name):
                    is_finite &= not rows.is_floating_point() or bool(rows.isfinite().all())
                    digest.update(tensor_bytes(rows))
                if not is_finite:
                    problems.append(f"{path}: tensor {name} holds NaN or infinity")
                parameters += math.prod(source.shape)
                kind = str(source.dtype).removeprefix("torch.")
                tensors[name] = f"{kind} {list(source.shape)} {digest.hexdigest()[:16]}"
        except ValueError as error:
            problems.append(str(error))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            problems += compare_index(index, tensors)
        except ValueError as error:
            problems.append(str(error))
    facts = {
        "class": next(iter(config.get("architectures") or ()), "?"),
        "model_type": config.get("model_type"),
        "parameters": parameters,
        "tensors": len(tensors),
        "bytes": num_bytes,
        "files": [path.name for path in files],
    }
    return Inspection("export", tuple(problems), facts, tensors)


def compare_index(index: Path, tensors: dict[str, str]) -> Iterator[str]:
    """Problems where the index and the files name different tensors."""
    listed = take(read_object(index), "weight_map", dict, index)
    for name in sorted(set(listed) ^ set(tensors)):
        where = "is in no file" if name in listed else "is not in the index"
        yield f"{index}: tensor {name} {where}"


def compare_checkpoints(first: Path, second: Path) -> dict[str, Any]:
    """Differences of two checkpoints that verify: numbers, settings, state, layout."""
    from amfm.pretrain.checkpoint.inspect import compare_checkpoints as compare
    from amfm.pretrain.checkpoint.manifest_file import read_manifest

    return compare((first, second), [read_manifest(folder) for folder in (first, second)])


def list_differences(compared: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Differences of two checkpoints as rows (what, first, second); a tensor's row says by how much it differs."""
    absent = "(absent)"
    rows: list[tuple[str, Any, Any]] = [("step", *compared["steps"])] if len(set(compared["steps"])) > 1 else []
    for section in ("layout", "settings", "identities", "state", "groups", "optimizer_steps"):
        rows += [(f"{section}: {name}", *values) for name, values in compared[section].items()]
    rows += [(name, "present", absent) for name in compared["only_in_first"]]
    rows += [(name, absent, "present") for name in compared["only_in_second"]]
    for name, kinds in compared["tensors"].items():
        rows.append((name, "differs by up to", ", ".join(f"{kind} {value:.2e}" for kind, value in kinds.items())))
    return rows


def diff_inspections(first: Inspection, second: Inspection) -> dict[str, tuple[Any, Any]]:
    """Facts, settings and tensors in which two folders differ, as name -> (first, second); "(absent)" on one side."""
    left, right = (
        {"kind": first.kind, **first.facts, **first.details},
        {"kind": second.kind, **second.facts, **second.details},
    )
    absent = "(absent)"
    pairs = {name: (left.get(name, absent), right.get(name, absent)) for name in dict.fromkeys([*left, *right])}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
