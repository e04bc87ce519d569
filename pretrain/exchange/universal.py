"""Training states in DeepSpeed's universal layout, both ways: whole float32 tensors, a folder per parameter.

    latest_universal                             the name TAG of the folder
    TAG/zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt   {"param": tensor}
    TAG/zero/NAME/step.pt                        the optimizer's counter
    TAG/amfm/                                    record, buffers and generators of an amfm run, for the way back

For moving a run to and from a program that holds the same model under DeepSpeed, without expert or tensor
parallelism there (its loader cuts neither our stacked experts nor our fused matrices). The checkpoint may come from any
layout. The file names and keys are those that `load_checkpoint` of DeepSpeed 0.19 asks for with
`{"checkpoint": {"load_universal": true}}` in its configuration, and those that its `ds_to_universal` writes.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amfm.data_pipeline.durable.foreign_files import inside, read_object
from amfm.data_pipeline.progress import Report, silent
from amfm.model.on_demand import OnDemand, Shape, Source, source_of
from amfm.pretrain.engine.moments import FROZEN, MUON
from amfm.pretrain.exchange.fit import Fitted, fit_tensors, one_step, shapes_of
from amfm.pretrain.exchange.state import TrainingState, check_record, read_state, with_tuples
from amfm.pretrain.exchange.torch_file import read_param, write_param
from amfm.pretrain.export.export import check_free
from amfm.pretrain.export.files import begin_export, put_in_place, sync_files
from amfm.pretrain.tensor_files import TensorFile, write_tensors

# Our kinds by DeepSpeed's names.
STATES = {"fp32": "weight", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
FILES = {kind: name for name, kind in STATES.items()}
LATEST, OWN, RECORD, TENSORS = "latest_universal", "amfm", "record.json", "state.safetensors"
UNIVERSAL_VERSION = 0.2


@dataclass(frozen=True)
class UniversalReport:
    """What was written: `tag` names the folder inside `path`, as `load_checkpoint(path)` finds it by itself."""

    path: Path
    tag: str
    step: int
    num_tensors: int
    num_bytes: int


def export_universal(checkpoint: str | Path, out_dir: str | Path, report: Report = silent) -> UniversalReport:
    """Write a checkpoint (or a run's newest) for DeepSpeed; OUT is absent or whole.

    Holds one block of rows at a time. Raises ValueError when OUT is in use, the run has `model.mup` or Muon trained it, RuntimeError
    when the checkpoint is damaged.
    """
    out = Path(out_dir)
    check_free(out)
    state = read_state(checkpoint, report)
    check_exportable(state)
    record = state.record
    tag = f"global_step{record['step']}"
    with begin_export(out) as temporary:
        folder = temporary / tag
        write_parameters(folder / "zero", state, report)
        write_own(folder / OWN, state)
        torch.save(describe_optimizer(record), folder / "zero" / "optimizer_state.pt")
        model_state = describe_model(state)
        torch.save(model_state, folder / "mp_rank_00_model_states.pt")
        # ZeRO 3 asks under another name.
        torch.save(model_state, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        (temporary / LATEST).write_text(tag, encoding="utf-8")
        sync_files(temporary)
        num_bytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        put_in_place(temporary, out)
    num_tensors = sum(len(sources) for sources in state.tensors.values())
    return UniversalReport(out, tag, record["step"], num_tensors, num_bytes)


def check_exportable(state: TrainingState) -> None:
    """Raise ValueError for a state that DeepSpeed's loader has no place for."""
    parameters = state.record["parameters"]
    frozen = [name for name, entry in parameters.items() if entry["group"] == FROZEN]
    if frozen:
        raise ValueError(
            f"{state.origin} is of a run that trains some weights only: {len(frozen)} others, {frozen[0]} first, are frozen and "
            "have no moments, which DeepSpeed's loader asks for; export it for huggingface or as dcp, or give a run that trains all"
        )
    if state.record["config"]["model"].get("mup") is not None:
        raise ValueError(
            f"{state.origin}: model.mup is set, and DeepSpeed has one learning rate for all groups of a universal checkpoint; "
            "go on with amfm, or export it with --format dcp, or the weights alone"
        )
    kind = state.record["config"].get("optimizer", {}).get("kind", "adamw")
    if MUON in state.record["groups"] or kind != "adamw":
        raise ValueError(
            f"{state.origin} was trained with optimizer.kind={kind}, and DeepSpeed's universal loading asks for AdamW's moments, which "
            "its matrices do not have; export it with --format dcp, or the weights alone (--format huggingface)"
        )


def write_parameters(folder: Path, state: TrainingState, report: Report) -> None:
    """Write float32 masters, moments and step of every parameter, each in a folder of its name."""
    parameters = state.record["parameters"]
    for number, (name, entry) in enumerate(parameters.items()):
        report("writing parameters and moments", number, len(parameters))
        place = folder / name
        place.mkdir(parents=True)
        for file_name, kind in STATES.items():
            write_param(place / f"{file_name}.pt", state.tensors[kind][name])
        torch.save(torch.tensor(float(entry["optimizer_step"])), place / "step.pt")


def write_own(folder: Path, state: TrainingState) -> None:
    """Write what DeepSpeed does not look for and a run goes on with: the record, buffers and generators."""
    folder.mkdir()
    (folder / RECORD).write_text(json.dumps(state.record), encoding="utf-8")
    tensors = {f"buffer/{name}": source.read(0, source.num_rows) for name, source in state.buffers.items()}
    tensors |= {f"random/{name}": tensor for name, tensor in state.random.items()}
    write_tensors(folder / TENSORS, tensors)


def describe_optimizer(record: dict[str, Any]) -> dict[str, Any]:
    """Collect the settings of the parameter groups, in the order of ours: matrices that decay, then the rest.

    ZeRO 3 gives the settings of the first group to all groups, so for it only those that all groups share are written;
    the others stay as its own program sets them.
    """
    groups = [{"label": label, **with_tuples(settings)} for label, settings in record["groups"].items()]
    shared = {key: value for key, value in groups[0].items() if all(group.get(key) == value for group in groups)}
    steps = {entry["optimizer_step"] for entry in record["parameters"].values()}
    return {
        "ds_version": record["versions"]["deepspeed"],
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(max(steps)))}}, "param_groups": [shared]},
    }


def describe_model(state: TrainingState) -> dict[str, Any]:
    """Collect what no parameter owns: counters, and as client state our buffers, progress and configuration.

    DeepSpeed does not restore buffers; its caller gets them back from `load_checkpoint` and loads them.
    """
    record = state.record
    counters = record["engine"]
    return {
        "module": {},
        "optimizer": None,
        "lr_scheduler": None,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": counters["global_steps"],
        "global_samples": counters["global_samples"],
        "skipped_steps": counters["skipped_steps"],
        "ds_version": record["versions"]["deepspeed"],
        "universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION},
        "buffers": {name: source.read(0, source.num_rows) for name, source in state.buffers.items()},
        "state": record["state"],
        "config": record["config"],
    }


class UniversalFolder:
    """A universal checkpoint to read: the folder of its tag, and the names of its parameters.

    Raises ValueError where it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / LATEST).is_file():
            self.path = inside(path, (path / LATEST).read_text(encoding="utf-8").strip())
        zero = self.path / "zero"
        if not zero.is_dir():
            raise ValueError(f"{zero} is missing; give a folder that DeepSpeed's ds_to_universal wrote, or its tag's")
        self.names = sorted(entry.name for entry in zero.iterdir() if entry.is_dir())

    def has_record(self) -> bool:
        """Whether an amfm run's record is there."""
        return (self.path / OWN / RECORD).is_file()

    def has_moments(self) -> bool:
        """True: one without moments is refused by their names."""
        return True

    def found(self) -> OnDemand:
        """All tensors by the names of their files."""
        files = [(kind, name, self.path / key_of(kind, name)) for name in self.names for kind in STATES.values()]
        return OnDemand({key_of(kind, name): read_param(file) for kind, name, file in files if file.is_file()})

    def step(self, names: Collection[str]) -> int:
        """The optimizer's counter. Raises ValueError where it is missing, or parameters differ in it."""
        steps = set()
        for name in names:
            file = self.path / "zero" / name / "step.pt"
            if not file.is_file():
                raise ValueError(f"{file} is missing; AdamW's bias correction needs the step of each moment")
            value = torch.load(file, weights_only=True)
            steps.add(int(value))
        return one_step(steps, self.path)

    def module(self, buffers: Mapping[str, Shape]) -> dict[str, Source]:
        """Read buffers from the module that DeepSpeed saves with ZeRO 0 to 2. Raises ValueError where they are not there."""
        if not buffers:
            return {}
        file = self.path / "mp_rank_00_model_states.pt"
        try:
            held = torch.load(file, weights_only=True, map_location="cpu", mmap=True)["module"]
            values = {name: held[name].float().clone() for name in buffers}
        except (OSError, KeyError, TypeError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{file} does not hold the buffers of the model, {next(iter(buffers))} first ({str(error)[:200]}); convert a "
                "checkpoint of ZeRO 1 or 2, whose files of the model have them"
            ) from error
        return {name: source_of(value) for name, value in values.items()}

    def read(self) -> TrainingState:
        """Read the state that `export_universal` wrote. Raises ValueError naming what is missing, surplus or misshaped."""
        file = self.path / OWN / RECORD
        record = read_object(file)
        check_record(record, str(file))
        labels = {name: entry["group"] for name, entry in record["parameters"].items()}
        tensors, _ = self.fit(shapes_of(record["parameters"]), labels, {})
        own = TensorFile(self.path / OWN / TENSORS)
        held = {key: own.numbers(key, 0, found.numel).view(found.shape) for key, found in own.tensors.items()}
        own.close()
        missing = [name for name in record["buffers"] if f"buffer/{name}" not in held]
        if missing:
            raise ValueError(f"{own.path}: buffer {missing[0]} is missing; copy the folder again")
        buffers = {name: source_of(held[f"buffer/{name}"]) for name in record["buffers"]}
        random = {key.removeprefix("random/"): value for key, value in held.items() if key.startswith("random/")}
        return TrainingState(str(self.path), tensors, buffers, random, record)

    def fit(self, shapes: Mapping[str, Shape], labels: Mapping[str, str], buffers: Mapping[str, Shape]) -> Fitted:
        """Fit the folder's tensors to a model, as `fit_tensors` does.

        Buffers are where DeepSpeed's converter puts them, among the parameters, else in the module's file.
        """
        found, apart = self.found(), {name: shape for name, shape in buffers.items() if name not in self.names}
        within = {name: shape for name, shape in buffers.items() if name not in apart}
        tensors, own = fit_tensors(found, key_of, str(self.path), shapes=shapes, labels=labels, buffers=within)
        return tensors, own | self.module(apart)


def key_of(kind: str, name: str) -> str:
    """The file of a tensor below the folder of the tag."""
    return f"zero/{name}/{FILES.get(kind, 'fp32')}.pt"


def is_universal(path: Path) -> bool:
    """Whether a folder looks like a universal checkpoint, or the folder of its tag."""
    return (path / LATEST).is_file() or (path / "zero" / "optimizer_state.pt").is_file()
