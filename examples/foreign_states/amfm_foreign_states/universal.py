"""Training states in DeepSpeed's universal layout, both ways: whole float32 tensors, a folder per parameter.

    latest_universal                             the name TAG of the folder
    TAG/zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt   {"param": tensor}
    TAG/zero/NAME/step.pt                        the optimizer's counter
    TAG/amfm/                                    record, buffers and generators of an amfm run, for the way back

For moving a run to and from a program that holds the same model under DeepSpeed: one of ours, without expert or tensor
parallelism there (its loader cuts neither our stacked experts nor our fused matrices), or Megatron-DeepSpeed's GPT model,
whose names and forms are in `megatron/deepspeed.py`. The checkpoint may come from any layout. The file names and keys are
those that `load_checkpoint` of DeepSpeed 0.19 asks for with `{"checkpoint": {"load_universal": true}}` in its
configuration, and those that its `ds_to_universal` writes; of ZeRO 3 that writes flat tensors, and one step for all.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amfm.data_pipeline.durable.json_files import inside, read_object, read_word
from amfm.data_pipeline.terminal import Report, silent
from amfm.model.config.schema import ModelConfig
from amfm.model.on_demand import OnDemand, Shape, Source, source_of
from amfm.pretrain.config.saved import read_saved_config
from amfm.pretrain.engine.adamw import FROZEN, MUON
from amfm.pretrain.stages import last_stage, resolve_stages
from amfm.pretrain.tensor_files import TensorFile, write_tensors
from amfm_foreign_states.megatron.deepspeed import (
    FUSED,
    GptKind,
    GptNames,
    check_expressible,
    describe_client,
    find_blocks,
    find_kind,
    name_for_export,
)
from amfm_foreign_states.rows import OwnNames
from amfm_foreign_states.state import ExportedState, TrainingState, check_record, export_state, with_tuples
from amfm_foreign_states.torch_file import (
    Fitted,
    find_steps,
    fit_tensors,
    one_step,
    read_common,
    read_integer,
    read_param,
    save_file,
    shapes_of,
    write_param,
)

# Our kinds by DeepSpeed's names.
STATES = {"fp32": "weight", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
FILES = {kind: name for name, kind in STATES.items()}
LATEST, OWN, RECORD, TENSORS = "latest_universal", "amfm", "record.json", "state.safetensors"
UNIVERSAL_VERSION = 0.2
# Of ZeRO 0 to 2, and of ZeRO 3, which asks under another name.
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def export_universal(
    checkpoint: str | Path, out_dir: str | Path, report: Report = silent, *, gpt: GptKind | None = None
) -> ExportedState:
    """Write a checkpoint (or a run's newest) for DeepSpeed, as `export_state` says; holds one block of rows.

    `gpt`: in the names of that model of Megatron-DeepSpeed, None: in ours. Raises ValueError when the run has `model.mup`
    or Muon trained it, or Megatron-DeepSpeed has no such model.
    """

    def write(out: Path, state: TrainingState) -> str:
        check_exportable(state)
        record, names, client = state.record, OwnNames(), {}
        if gpt is not None:
            config = read_saved_config(record)
            names = name_for_export(config.model, gpt, state.origin)
            stage = last_stage(resolve_stages(config), record["step"])
            client = describe_client(record, config.model, stage.train.sequence_length)
        tag = f"global_step{record['step']}"
        folder = out / tag
        write_parameters(folder / "zero", state, names, report)
        write_own(folder / OWN, state)
        save_file(describe_optimizer(record), folder / "zero" / "optimizer_state.pt")
        for name in MODEL_STATES:
            save_file(describe_model(state) | client, folder / name)
        (out / LATEST).write_text(tag, encoding="utf-8")
        return tag

    return export_state(checkpoint, Path(out_dir), write, report)


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
            "continue with amfm, or export it with --format dcp, or only the weights"
        )
    kind = state.record["config"].get("optimizer", {}).get("kind", "adamw")
    if MUON in state.record["groups"] or kind != "adamw":
        raise ValueError(
            f"{state.origin} was trained with optimizer.kind={kind}, and DeepSpeed's universal loading asks for AdamW's moments, which "
            "its matrices do not have; export it with --format dcp, or only the weights (--format huggingface)"
        )


def write_parameters(folder: Path, state: TrainingState, names: OwnNames, report: Report) -> None:
    """Write float32 master weights, moments and step of every parameter, each in a folder of its name."""
    steps = {names.theirs(name): entry["optimizer_step"] for name, entry in state.record["parameters"].items()}
    tensors = {file_name: names.write(state.tensors[kind]) for file_name, kind in STATES.items()}
    for number, (name, step) in enumerate(steps.items()):
        report("writing parameters and moments", number, len(steps))
        place = folder / name
        place.mkdir(parents=True)
        for file_name, sources in tensors.items():
            write_param(place / f"{file_name}.pt", sources[name], names.extras(name))
        save_file(torch.tensor(float(step)), place / "step.pt")


def write_own(folder: Path, state: TrainingState) -> None:
    """Write what DeepSpeed does not look for and a run continues with: the record, buffers and generators."""
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

    Raises ValueError if it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / LATEST).is_file():
            self.path = inside(path, read_word(path / LATEST))
        zero = self.path / "zero"
        if not zero.is_dir():
            raise ValueError(f"{zero} is missing; give a folder that DeepSpeed's ds_to_universal wrote, or its tag's")
        self.folders = sorted(entry.name for entry in zero.iterdir() if entry.is_dir())
        self.names = OwnNames()

    def has_record(self) -> bool:
        """Whether an amfm run's record is there."""
        return (self.path / OWN / RECORD).is_file()

    def has_moments(self) -> bool:
        """True: one without moments is rejected by their names."""
        return True

    def name_parameters(self, model: ModelConfig) -> None:
        """Read parameters by Megatron-DeepSpeed's names where the folder has them.

        Raises ValueError if its GPT model is not the one that is described, or its order of rows is not known.
        """
        gpt = find_kind(self.folders)
        if gpt is None:
            return
        check_expressible(model, self.path)
        assert model.attention is not None, "each layer has attention"
        states = self.states()
        self.names = GptNames(model, gpt, find_blocks(model.attention, read_common(states).get("args"), states))

    def key_of(self, kind: str, name: str) -> str:
        """The file that holds a tensor of ours, below the folder of the tag, and which part of it if it holds several."""
        theirs = self.names.theirs(name)
        return place_of(kind, theirs) + (f" ({name})" if theirs.endswith(FUSED) else "")

    def found(self, shapes: Mapping[str, Shape]) -> OnDemand:
        """All tensors by keys: those of parameters of these shapes, and what else is there."""
        sources: dict[str, Source] = {}
        known = {self.names.theirs(name) for name in shapes}
        for kind in STATES.values():
            files = {name: self.path / place_of(kind, name) for name in self.folders}
            held = {name: read_param(file) for name, file in files.items() if file.is_file()}
            sources |= {self.key_of(kind, name): source for name, source in self.names.read(held, shapes)}
            sources |= {place_of(kind, name): source for name, source in held.items() if name not in known}
        return OnDemand(sources)

    def step(self, names: Collection[str]) -> int:
        """The optimizer's counter. Raises ValueError if it is missing, or parameters differ in it."""
        files = [self.path / "zero" / self.names.theirs(name) / "step.pt" for name in names]
        missing = [file for file in files if not file.is_file()]
        if len(missing) == len(files):
            # Of ZeRO 3: one for all, next to the groups' settings.
            missing = [self.path / "zero" / "optimizer_state.pt"]
            state = read_common(missing[0]).get("optimizer_state_dict")
            steps = list(find_steps(state))
            if steps:
                return one_step(set(steps), missing[0])
        if missing:
            raise ValueError(f"{missing[0]} has no step; AdamW's bias correction needs that of each moment")
        return one_step({read_integer(file) for file in files}, self.path)

    def module(self, buffers: Mapping[str, Shape]) -> dict[str, Source]:
        """Read buffers from the module that DeepSpeed saves. Raises ValueError if they are not there."""
        if not buffers:
            return {}
        file = self.states()
        module = read_common(file).get("module")
        held = module if isinstance(module, Mapping) else {}
        missing = [name for name in buffers if not isinstance(held.get(name), Tensor)]
        if missing:
            raise ValueError(
                f"{file} does not hold the buffers of the model, {missing[0]} first; convert a checkpoint whose files of the "
                "model have them"
            )
        return {name: source_of(held[name].float().clone()) for name in buffers}

    def states(self) -> Path:
        """The file of the model's states."""
        return next((self.path / name for name in MODEL_STATES if (self.path / name).is_file()), self.path)

    def read(self) -> TrainingState:
        """Read the state that `export_universal` wrote. Raises ValueError naming what is missing, surplus or misshaped."""
        file = self.path / OWN / RECORD
        record = read_object(file)
        check_record(record, str(file))
        self.name_parameters(read_saved_config(record).model)
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
        apart = {name: shape for name, shape in buffers.items() if name not in self.folders}
        within = {name: shape for name, shape in buffers.items() if name not in apart}
        found = self.found({**shapes, **within})
        tensors, own = fit_tensors(found, self.key_of, str(self.path), shapes=shapes, labels=labels, buffers=within)
        return tensors, own | self.module(apart)


def place_of(kind: str, name: str) -> str:
    """The file of a tensor below the folder of the tag, by the name of its folder."""
    return f"zero/{name}/{FILES.get(kind, 'fp32')}.pt"


def is_universal(path: Path) -> bool:
    """Whether a folder looks like a universal checkpoint, or the folder of its tag."""
    return (path / LATEST).is_file() or (path / "zero" / "optimizer_state.pt").is_file()
