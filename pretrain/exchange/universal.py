"""From a checkpoint to what DeepSpeed's own universal loading reads: whole float32 tensors, a folder a parameter.

For moving a run to a program of one's own that holds the same model under DeepSpeed, without expert or tensor
parallelism there (its loader cuts neither our stacked experts nor our fused matrices). The checkpoint may come from any
layout. The file names and keys are those that `load_checkpoint` of DeepSpeed 0.19 asks for with
`{"checkpoint": {"load_universal": true}}` in its configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amfm.data_pipeline.progress import Report, silent
from amfm.pretrain.checkpoint.inspect import find_checkpoint, read_buffers, require_sound
from amfm.pretrain.checkpoint.reader import RangeReader
from amfm.pretrain.engine.moments import FROZEN, MUON
from amfm.pretrain.export.export import check_free
from amfm.pretrain.export.files import begin_export, put_in_place, sync_files

# Our kinds by DeepSpeed's names.
STATES = {"fp32": "weight", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
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

    Holds one tensor at a time. Raises ValueError when OUT is in use, the run has `model.mup` or Muon trained it, RuntimeError
    when the checkpoint is damaged.
    """
    out = Path(out_dir)
    check_free(out)
    source = find_checkpoint(Path(checkpoint), report)
    manifest = require_sound(source, report)
    frozen = [name for name, entry in manifest["parameters"].items() if entry["group"] == FROZEN]
    if frozen:
        raise ValueError(
            f"{source} is of a run that trains some weights only: {len(frozen)} others, {frozen[0]} first, are frozen and "
            "have no moments, which DeepSpeed's loader asks for; export it for huggingface, or give a run that trains all"
        )
    if manifest["config"]["model"].get("mup") is not None:
        raise ValueError(
            f"{source}: model.mup is set, and DeepSpeed has one learning rate for all groups of a universal checkpoint; "
            "go on with amfm, or export the weights alone with amfm export"
        )
    if MUON in manifest["groups"]:
        raise ValueError(
            f"{source} was trained with optimizer.kind=muon, and DeepSpeed's universal loading asks for AdamW's moments, which "
            "Muon's matrices do not have; export the weights as safetensors instead (--format huggingface)"
        )
    tag = f"global_step{manifest['step']}"
    with begin_export(out) as temporary:
        folder = temporary / tag
        report("writing parameters and moments")
        write_parameters(folder / "zero", source, manifest)
        torch.save(describe_optimizer(manifest), folder / "zero" / "optimizer_state.pt")
        model_state = describe_model(source, manifest)
        torch.save(model_state, folder / "mp_rank_00_model_states.pt")
        # ZeRO 3 asks under another name.
        torch.save(model_state, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        (temporary / "latest_universal").write_text(tag, encoding="utf-8")
        sync_files(temporary)
        num_bytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        put_in_place(temporary, out)
    return UniversalReport(out, tag, manifest["step"], len(manifest["parameters"]), num_bytes)


def write_parameters(folder: Path, source: Path, manifest: dict[str, Any]) -> None:
    """Write float32 masters, moments and step of every parameter, each in a folder of its name."""
    reader = RangeReader(source, manifest)
    for name, entry in manifest["parameters"].items():
        place = folder / name
        place.mkdir(parents=True)
        for file_name, kind in STATES.items():
            torch.save({"param": reader.whole(kind, name)}, place / f"{file_name}.pt")
        torch.save(torch.tensor(float(entry["optimizer_step"])), place / "step.pt")


def describe_optimizer(manifest: dict[str, Any]) -> dict[str, Any]:
    """Collect the settings of the parameter groups, in the order of ours: matrices that decay, then the rest.

    ZeRO 3 gives the settings of the first group to all groups, so for it only those that all groups share are written;
    the others stay as its own program sets them.
    """
    groups = [{"label": label, **with_tuples(settings)} for label, settings in manifest["groups"].items()]
    shared = {key: value for key, value in groups[0].items() if all(group.get(key) == value for group in groups)}
    steps = {entry["optimizer_step"] for entry in manifest["parameters"].values()}
    return {
        "ds_version": manifest["versions"]["deepspeed"],
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(max(steps)))}}, "param_groups": [shared]},
    }


def with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert settings from JSON to torch's form, in which pairs (betas) are tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def describe_model(source: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Collect what no parameter owns: counters, and as client state our buffers, progress and configuration.

    DeepSpeed does not restore buffers; its caller gets them back from `load_checkpoint` and loads them.
    """
    counters = manifest["engine"]
    return {
        "module": {},
        "optimizer": None,
        "lr_scheduler": None,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": counters["global_steps"],
        "global_samples": counters["global_samples"],
        "skipped_steps": counters["skipped_steps"],
        "ds_version": manifest["versions"]["deepspeed"],
        "universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION},
        "buffers": dict(read_buffers(source, manifest)),
        "state": manifest["state"],
        "config": manifest["config"],
    }
