"""A training state as tensors by kind and name: what the formats of other programs are written from and read into.

Every format goes through this one form. Writing: a verified checkpoint of any layout becomes a `TrainingState`
(`read_state`), whose tensors are read when they are asked for, some rows at a time. Reading: a format gives the same
form, and `write_run` puts it into a run directory, as the checkpoint of one rank. So what is read enters training by
the door that every resume takes, with its digests and its checks, and the training loop knows nothing of other formats.

The `record` is the manifest of a checkpoint without what says where tensors are. Formats that have a place for it carry
it, and a run then continues as if it had never left. For those without, `adopt.py` makes one from a configuration.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.durable.json_files import take
from amfm.data_pipeline.terminal import Report, silent
from amfm.model.on_demand import Shape, Source, cut_rows, source_of
from amfm.pretrain.checkpoint.commit import commit, make_temporary
from amfm.pretrain.checkpoint.files import FileEntry, collect_random_state
from amfm.pretrain.checkpoint.inspect import find_checkpoint, require_sound
from amfm.pretrain.checkpoint.manifest_file import MAPPINGS, rank_file_name
from amfm.pretrain.checkpoint.reader import (
    JoinedReports,
    RangeReader,
    RankReport,
    complete_manifest,
    describe_tensor,
    kinds_of,
)
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.saved import read_saved_config
from amfm.pretrain.export.files import begin_export, put_in_place, sync_files
from amfm.pretrain.tensor_files import TensorFile, TensorWriter

# Of a manifest: where tensors are, and what protects the file that it is.
PLACES = ("format", "format_version", "sha256", "files", "shards", "layout")
ONE_RANK = {"world_size": 1, "axes": {"dp": 1}, "zero_stage": 0}


@dataclass(frozen=True)
class TrainingState:
    """Master weights and moments by kind (`weight`, `exp_avg`, ...) and name, buffers, rank 0's generators, and the record.

    warnings: what continuing with it means, in sentences.
    """

    origin: str
    tensors: Mapping[str, Mapping[str, Source]]
    buffers: Mapping[str, Source]
    random: Mapping[str, Tensor]
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def keyed(self) -> Iterator[tuple[str, str, Source]]:
        """Iterate over kind, name and source of all master weights and moments."""
        for kind, sources in self.tensors.items():
            for name, source in sources.items():
                yield kind, name, source

    def num_tensors(self) -> int:
        """Count master weights, moments and buffers."""
        return len(self.buffers) + sum(len(sources) for sources in self.tensors.values())

    def num_bytes(self) -> int:
        """Bytes of master weights, moments and buffers."""
        sources = [source for _, _, source in self.keyed()] + list(self.buffers.values())
        return sum(math.prod(source.shape) * source.dtype.itemsize for source in sources)


def read_state(checkpoint: str | Path, report: Report = silent) -> TrainingState:
    """Read a checkpoint of any layout, or a run's newest; every digest is verified first.

    Raises RuntimeError if it is damaged, or there is none.
    """
    source = find_checkpoint(Path(checkpoint), report)
    manifest = require_sound(source, report)
    reader = RangeReader(source, manifest)
    tensors: dict[str, dict[str, Source]] = {}
    for name in manifest["parameters"]:
        manifest["parameters"][name].pop("averaged", None)  # other programs have no place for averages
        for kind in kinds_of(manifest, name):
            tensors.setdefault(kind, {})[name] = reader.source(kind, name)
    file = TensorFile(source / rank_file_name(0), RuntimeError)
    generators = [key for key in file.tensors if key.startswith("random/")]
    random = {key.removeprefix("random/"): file.rows(key, 0, file.tensors[key].numel) for key in generators}
    file.close()
    buffers = {name: source_of(reader.buffer(name)) for name in manifest["buffers"]}
    record = {key: value for key, value in manifest.items() if key not in PLACES}
    record["buffers"] = {name: describe_tensor(source.shape, source.dtype) for name, source in buffers.items()}
    return TrainingState(str(source), tensors, buffers, random, record)


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Hold a record that a file gave to its form. Raises ValueError, also for settings that this program does not know."""
    take(record, "step", int, where)
    for key in set(MAPPINGS) - set(PLACES):
        take(record, key, dict, where)
    for name, entry in record["parameters"].items():
        for key, kind in (("shape", list), ("dtype", str), ("group", str), ("optimizer_step", int)):
            take(entry, key, kind, f"{where}, {name}")
    for name, entry in record["buffers"].items():
        take(entry, "shape", list, f"{where}, {name}")
    read_saved_config(record)


def with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert settings from JSON to torch's form, in which pairs (betas) are tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


@dataclass(frozen=True)
class ExportedState:
    """A folder that was written: step, tensors and bytes. tag: of the folder inside of it that DeepSpeed finds on its
    own.
    """

    path: Path
    step: int
    num_tensors: int
    num_bytes: int
    tag: str | None = None


def export_state(
    checkpoint: str | Path, out: Path, write: Callable[[Path, TrainingState], str | None], report: Report
) -> ExportedState:
    """Let `write` put the state of a checkpoint of any layout, or of a run's newest, into a folder; OUT is absent or whole.

    `write` returns the tag, where the format has one. Raises ValueError when OUT is in use, RuntimeError when the
    checkpoint is damaged.
    """
    check_free(out)
    state = read_state(checkpoint, report)
    with begin_export(out) as temporary:
        tag = write(temporary, state)
        sync_files(temporary)
        num_bytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        put_in_place(temporary, out)
    return ExportedState(out, state.record["step"], state.num_tensors(), num_bytes, tag)


@dataclass(frozen=True)
class WrittenRun:
    """A run directory that was written: its checkpoint, step, how many tensors and bytes, and the state's warnings."""

    path: Path
    checkpoint: Path
    step: int
    num_tensors: int
    num_bytes: int
    warnings: tuple[str, ...] = ()


def write_run(out: Path, state: TrainingState, report: Report = silent) -> WrittenRun:
    """Write a run directory OUT with a checkpoint of the state, which `amfm train OUT/config.yaml` continues from.

    OUT is absent or whole. Its checkpoint is of one rank, and any layout loads it; ranks after the first keep the random
    state of their seed. Raises ValueError for a number that is not finite.
    """
    config = read_saved_config(state.record)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(out)})})
    with begin_export(out) as temporary:
        checkpoints = temporary / "checkpoints"
        checkpoints.mkdir()
        folder = make_temporary(checkpoints, state.record["step"])
        manifest = _write_tensors(folder, state, report)
        saved = commit(folder, manifest)
        (temporary / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
        sync_files(temporary)
        put_in_place(temporary, out)
    checkpoint = out / "checkpoints" / saved.name
    return WrittenRun(out, checkpoint, state.record["step"], state.num_tensors(), state.num_bytes(), state.warnings)


def _write_tensors(folder: Path, state: TrainingState, report: Report) -> dict[str, Any]:
    """Write the one file of the checkpoint, and return its manifest."""
    random = state.random or collect_random_state()
    sources = {f"{kind}/{name}/0": source for kind, name, source in state.keyed()}
    sources |= {f"buffer/{name}": source for name, source in state.buffers.items()}
    shapes: dict[str, tuple[torch.dtype, Shape]] = {
        f"{kind}/{name}/0": (torch.float32, (math.prod(source.shape),)) for kind, name, source in state.keyed()
    }
    shapes |= {f"buffer/{name}": (source.dtype, source.shape) for name, source in state.buffers.items()}
    shapes |= {f"random/{name}": (tensor.dtype, tuple(tensor.shape)) for name, tensor in random.items()}
    path = folder / rank_file_name(0)
    writer = TensorWriter(path, shapes)
    done, total = 0, state.num_bytes()
    for key, source in sources.items():
        report("writing the checkpoint", done, total)
        flat = not key.startswith("buffer/")
        row_numel = math.prod(source.shape[1:]) if flat else 1
        for start, stop in cut_rows(source.num_rows, source.shape):
            rows = source.read(start, stop)
            if rows.is_floating_point() and not bool(torch.isfinite(rows).all()):
                raise ValueError(f"{state.origin}: {key.rpartition('/')[0]} holds NaN or infinity; nothing is written")
            writer.put(key, start * row_numel, rows.reshape(-1) if flat else rows)
        done += math.prod(source.shape) * source.dtype.itemsize
    for name, tensor in random.items():
        writer.put(f"random/{name}", 0, tensor)
    writer.finish()
    with path.open("rb") as file:
        entry = FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    whole: dict[str, Any] = {"where": {}, "coordinates": {}}
    parameters = state.record["parameters"]
    written = RankReport(
        parameters=parameters,
        shards=dict.fromkeys(parameters, whole),
        ranges=[(name, 0, math.prod(described["shape"])) for name, described in parameters.items()],
        buffers=state.record["buffers"],
        groups=state.record["groups"],
        file=entry,
    )
    precision = state.record["config"]["train"]["precision"]
    return complete_manifest(
        {**state.record, "layout": {**ONE_RANK, "precision": precision}}, JoinedReports.of(0, written)
    )
