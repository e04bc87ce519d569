"""Training states as torch Distributed Checkpoint, by torch's own writer, in the names of torch's own state dicts.

    model.NAME                            float32 master weights and buffers
    optimizer.state.NAME.exp_avg          moments (Muon: .momentum), and .step, as torch's AdamW keeps them
    optimizer.param_groups.INDEX.KEY      settings of the groups; `params` names the members
    amfm.record, amfm.random.KEY          what a run needs to continue, and no other program looks at

So `dcp.load({"model": ..., "optimizer": get_optimizer_state_dict(...)})` in a program that has a module of the same names
and AdamW restores both, sharded as that program is. A save plan of blocks of rows, whose data is read when torch's writer
asks for it, keeps memory at one block.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from amfm.data_pipeline.terminal import Report, silent
from amfm.model.on_demand import OnDemand, Shape, Source, cut_rows, source_of
from amfm.pretrain.engine.adamw import FROZEN, MATRICES, MUON
from amfm_foreign_states.dcp_folder import DcpFolder, read_json
from amfm_foreign_states.state import ExportedState, TrainingState, check_record, export_state, with_tuples
from amfm_foreign_states.torch_file import BUFFER, Fitted, fit_tensors, one_step, shapes_of, system_errors

OURS = "amfm."
RECORD = f"{OURS}record"
RANDOM = f"{OURS}random."


class StreamedPlanner(DefaultSavePlanner):
    """Plans blocks of rows of sources, and reads each when the writer asks for it."""

    def __init__(self, report: Report = silent) -> None:
        super().__init__(flatten_sharded_tensors=False)
        self.report = report
        self.written: Tensor | None = None
        self.done = self.total = 0

    def create_local_plan(self) -> SavePlan:
        """Plan all items of the state."""
        items = [item for name, value in self.state_dict.items() for item in self._items(name, value)]
        self.total = len(items)
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def _items(self, name: str, value: Any) -> Iterator[WriteItem]:
        """List the blocks of a tensor, or the one item of another value."""
        if not isinstance(value, Source):
            yield WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
            return
        shape, properties = torch.Size(value.shape), TensorProperties(dtype=value.dtype)
        for start, stop in cut_rows(value.num_rows, value.shape):
            offsets = torch.Size([start, *([0] * (len(shape) - 1))] if shape else [])
            sizes = torch.Size([stop - start, *shape[1:]] if shape else [])
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, shape)
            yield WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Read a block, and give back the memory of the one before: the writer keeps what it wrote until the file ends."""
        value = self.state_dict[write_item.index.fqn]
        self.report("writing", self.done, self.total)
        self.done += 1
        if not isinstance(value, Source):
            return self.transform_object(write_item, value)
        if self.written is not None:
            self.written.untyped_storage().resize_(0)
        assert write_item.tensor_data is not None, "a source is planned with its place"
        chunk = write_item.tensor_data.chunk
        start, stop = (chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) if chunk.sizes else (0, 1)
        # A separate copy: a view's memory is its owner's.
        self.written = value.read(start, stop).clone(memory_format=torch.contiguous_format)
        return self.written


def export_dcp(checkpoint: str | Path, out_dir: str | Path, report: Report = silent) -> ExportedState:
    """Write a checkpoint (or a run's newest) as torch Distributed Checkpoint, as `export_state` says; holds one block of rows."""

    def write(folder: Path, state: TrainingState) -> None:
        # No copies ahead: the planner gives back the memory of each block when the next is asked for.
        writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0, sync_files=True)
        with system_errors(folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(state_dict(state), storage_writer=writer, planner=StreamedPlanner(report), no_dist=True)

    return export_state(checkpoint, Path(out_dir), write, report)


def state_dict(state: TrainingState) -> dict[str, Any]:
    """Arrange a state as torch's state dicts of a model and its optimizer, with sources instead of tensors."""
    parameters = state.record["parameters"]
    if MATRICES in state.record["groups"]:
        raise ValueError(
            f"{state.origin} has states of whole matrices, which torch's optimizers have no place for; export only the weights "
            "(--format huggingface)"
        )
    optimizer: dict[str, dict[str, Any]] = {}
    for kind, name, source in state.keyed():
        if kind != "weight":
            optimizer.setdefault(name, {})[kind] = source
    for name, own in optimizer.items():
        own["step"] = source_of(torch.tensor(float(parameters[name]["optimizer_step"])))
    return {
        "model": {**state.tensors["weight"], **state.buffers},
        "optimizer": {"state": optimizer, "param_groups": param_groups(state.record)},
        "amfm": {
            "record": json.dumps(state.record),
            "random": {name: source_of(tensor) for name, tensor in state.random.items()},
        },
    }


def param_groups(record: dict[str, Any]) -> list[dict[str, Any]]:
    """List the groups as torch writes AdamW's, with every setting that it asks for at loading.

    Those of a group that Muon steps are ours.
    """
    adamw = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    groups = []
    for label, settings in record["groups"].items():
        names = [name for name, entry in record["parameters"].items() if entry["group"] == label]
        groups.append({**({} if label == MUON else adamw), **with_tuples(settings), "params": names})
    return groups


class DcpStates:
    """A training state in a folder of torch Distributed Checkpoint, to read."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, DcpFolder(path)

    def has_record(self) -> bool:
        """Whether an amfm run's record is there."""
        return RECORD in self.folder.values

    def has_moments(self) -> bool:
        """Whether an optimizer's state is there."""
        return any(name.startswith("optimizer.") for name in self.folder.tensors)

    def read(self) -> TrainingState:
        """Read the state that `export_dcp` wrote, or a program that kept its record.

        Raises ValueError naming tensors that are missing, surplus or of another shape.
        """
        record = read_json(self.folder, RECORD)
        check_record(record, f"{self.path}, {RECORD}")
        labels = {name: entry["group"] for name, entry in record["parameters"].items()}
        tensors, buffers = self.fit(shapes_of(record["parameters"]), labels, shapes_of(record["buffers"]))
        names = [name for name in self.folder.tensors if name.startswith(RANDOM)]
        random = {name.removeprefix(RANDOM): self.folder.tensor(name).clone() for name in names}
        return TrainingState(str(self.path), tensors, buffers, random, record)

    def fit(self, shapes: Mapping[str, Shape], labels: Mapping[str, str], buffers: Mapping[str, Shape]) -> Fitted:
        """Fit the folder's tensors to a model, as `fit_tensors` does."""
        names = [name for name in self.folder.tensors if not name.startswith(OURS)]
        steps = [key_of("step", name) for name in shapes if labels[name] != FROZEN]
        found = OnDemand({name: self.folder.source(name) for name in names})
        return fit_tensors(found, key_of, str(self.path), shapes=shapes, labels=labels, buffers=buffers, ignored=steps)

    def step(self, names: Collection[str]) -> int:
        """The optimizer's counter, which all parameters must share. Raises ValueError if they do not."""
        keys = [key_of("step", name) for name in names]
        missing = [key for key in keys if key not in self.folder.tensors]
        if missing:
            raise ValueError(
                f"{self.path}: {missing[0]} is missing; AdamW's bias correction needs the step of each moment"
            )
        return one_step({int(self.folder.tensor(key)) for key in keys}, self.path)


def key_of(kind: str, name: str) -> str:
    """The key of a tensor in torch's state dicts of a model and its optimizer."""
    return f"model.{name}" if kind in ("weight", BUFFER) else f"optimizer.state.{name}.{kind}"
