"""What a run that is a stage of a conversion trains: everything else is frozen before the engine takes the model.

Low-rank updates that were trained elsewhere, which a router learns to choose among while they stay as they are.

    convert.tune.routing.updates: [A, B, ...]    a run that tuned one update (convert-tune, convert-tune-teacher) or a
                                                 checkpoint of it, or a folder that peft wrote for an export of ours

Update e becomes rows e r .. (e + 1) r of `down` and those columns of `up`, times its own alpha / rank over the conversion's.
After LoRA-Mixer, whose frozen updates are those of separate trainings, where only the router is trained.

Packages bring kinds of update to the tuning, next to low-rank updates of projections: an entry point of the group
`amfm.adapters` names an `AdapterSpec`, and `convert.tune.adapters` asks for it by name. An adapter puts parameters into a model
whose other weights are frozen; the result has them merged into those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from amfm.model.config.plugins import how_to_install, load_named, specs_by_name
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.lora import PROJECTIONS, add_lora
from amfm.model.on_demand import on_demand
from amfm.model.routed_updates import ENDS
from amfm.model.shapes import weight_shapes
from amfm.pretrain.checkpoint.inspect import find_checkpoint, read_full_state
from amfm.pretrain.checkpoint.manifest_file import read_manifest
from amfm.pretrain.config.convert import ConvertConfig, TuneConfig
from amfm.pretrain.inference.own_part import take_own_part
from amfm.pretrain.tensor_files import TensorFile


@runtime_checkable
class Imitator(Protocol):
    """A mixer with the weights of softmax attention and two branches, such as window_linear of examples/convert.

    transfer_scale: it hands on what attention gives, and its distance from it as the loss. used: the branches it has.
    """

    transfer_scale: float | None
    used: Literal["both", "window", "linear"]


def prepare_stage(model: HybridModel, convert: ConvertConfig, *, resumes: bool = False) -> None:
    """Freeze a model that has its first weights, add the stage's low-rank updates, and set what its blocks give.

    resumes: a checkpoint will be loaded, which has the updates that were trained elsewhere.
    No collectives; every rank must call this. Raises ValueError if this rank would hold nothing to train.
    """
    model.requires_grad_(False)
    is_control = convert.stage in ("tune-window", "tune-teacher")
    if not is_control:
        for name in new_weights(model, convert):
            model.get_parameter(name).requires_grad_(True)
    if convert.stage == "transfer":
        assert convert.transfer is not None, "a stage of a conversion that has it"
        for mixer in converted_mixers(model, convert):
            mixer.transfer_scale = convert.transfer.scale
    else:
        tune = convert.tuning()
        if tune.routing is None:
            add_lora(model, tune.targets, rank=tune.rank, alpha=tune.alpha)
        for adapter in tune.adapters:
            for name in find_adapter(adapter).add_update(model, rank=tune.rank, alpha=tune.alpha):
                model.get_parameter(name).requires_grad_(True)
        brought = tune.routing is not None and tune.routing.updates
        if brought and not resumes:
            take_updates(model, convert)
        for name, parameter in model.named_parameters():
            if (name.endswith(UPDATE_ENDS) and not brought) or name.endswith(ROUTER_END):
                parameter.requires_grad_(True)
    if convert.stage == "tune-window":
        for mixer in converted_mixers(model, convert):
            mixer.used = "window"
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"the blocks {model.blocks.indices()} of this pipeline rank have nothing that convert-{convert.stage} trains; "
            "use fewer parallel.pipeline ranks, or cut model.pattern so that each has a converted block"
        )


def converted_mixers(model: HybridModel, convert: ConvertConfig) -> list[Imitator]:
    """The mixers of converted blocks held here that have their own branches."""
    held = [model.blocks[index].mixer for index in model.blocks.indices() if index in (convert.blocks or ())]
    return [mixer for mixer in held if isinstance(mixer, Imitator)]


def new_weights(model: HybridModel, convert: ConvertConfig) -> list[str]:
    """Name the weights of converted blocks held here that softmax attention has not: those of the mixer's own.

    Of a mixer other than window_linear all its weights are trained: what fitted is not a whole attention any more.
    """
    found = []
    for index in model.blocks.indices():
        if index not in (convert.blocks or ()):
            continue
        mixer = model.blocks[index].mixer
        for name, _ in mixer.named_parameters():
            if not (isinstance(mixer, Imitator) and is_of_attention(name)):
                found.append(f"blocks.{index}.mixer.{name}")
    return found


def is_of_attention(name: str) -> bool:
    """Whether softmax attention has a weight of window_linear's too."""
    return name.partition(".")[0] in (*PROJECTIONS.values(), "g_proj", "q_norm", "k_norm")


ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
UPDATE_ENDS, ROUTER_END = ENDS[:2], ENDS[2]
PEFT_ENDS = {"lora_A.weight": "lora.down", "lora_B.weight": "lora.up"}
# Settings of peft under which A and B are not all of an update, or do not count lora_alpha / r times.
PEFT_REFUSED = ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


def take_updates(model: HybridModel, convert: ConvertConfig) -> None:
    """Put the updates that convert.tune.routing.updates names into a model, each rank its part. No collectives.

    Raises ValueError if they do not fit the model.
    """
    names = {name for name, _ in model.named_parameters() if name.endswith(UPDATE_ENDS)}
    take_own_part(model, on_demand(stack_updates(convert.tuning(), names)), names)


def check_updates(tune: TuneConfig, model: ModelConfig) -> None:
    """Read the updates before a stage trains. Raises ValueError if they do not fit the model of that stage."""
    shapes = {name: shape for name, shape in weight_shapes(model).items() if name.endswith(UPDATE_ENDS)}
    for name, tensor in stack_updates(tune, set(shapes)).items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"convert.tune.routing.updates make {name} {tuple(tensor.shape)}, and the model has {shapes[name]}; give "
                "updates of this teacher"
            )


def stack_updates(tune: TuneConfig, names: set[str]) -> dict[str, Tensor]:
    """Read the factors `names` of all updates and lay them after each other: whole tensors by name.

    Raises ValueError for an update of another rank, and one that has not all of these factors.
    """
    assert tune.routing is not None, "only a conversion with a router has them"
    found = []
    for path in tune.routing.updates:
        factors, rank, alpha = read_update(Path(path))
        what = f"convert.tune.routing.updates: {path}"
        if rank != tune.rank:
            raise ValueError(f"{what} has rank {rank}, and convert.tune.rank={tune.rank}; give updates of one rank")
        missing, surplus = sorted(names - factors.keys()), sorted(factors.keys() - names)
        if missing or surplus:
            words = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which the model has not"
            raise ValueError(f"{what} {words}; make convert.tune.targets those of the update")
        scale = (alpha / rank) / (tune.alpha / tune.rank)
        found.append({name: factors[name] * (scale if name.endswith(".up") else 1.0) for name in names})
    return {name: torch.cat([each[name] for each in found], dim=1 if name.endswith(".up") else 0) for name in names}


def read_update(path: Path) -> tuple[Mapping[str, Tensor], int, float]:
    """Factors of one update under amfm's names, its rank and alpha. Raises ValueError for what is none."""
    if (path / ADAPTER_CONFIG).is_file():
        return _read_adapter(path)
    checkpoint = find_checkpoint(path)
    tune: dict[str, Any] | None = (read_manifest(checkpoint)["config"].get("convert") or {}).get("tune")
    state = read_full_state(checkpoint)
    factors = {name: state[name] for name in state if name.endswith(UPDATE_ENDS)}
    if not factors or tune is None or tune.get("routing"):
        raise ValueError(
            f"{path} has not one low-rank update; give a convert-tune or convert-tune-teacher run of a conversion without "
            "routing, or a folder that peft wrote"
        )
    return factors, int(tune["rank"]), float(tune["alpha"])


def _read_adapter(folder: Path) -> tuple[Mapping[str, Tensor], int, float]:
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    wrong = [name for name in PEFT_REFUSED if settings.get(name)]
    if settings.get("peft_type") != "LORA" or wrong or settings.get("bias", "none") != "none":
        what = ", ".join(wrong) or f"peft_type {settings.get('peft_type')} and bias {settings.get('bias')}"
        raise ValueError(f"{folder} has {what}, and an update here is only A and B of LoRA; train it without")
    tensors = TensorFile(folder / ADAPTER).on_demand()
    factors = {}
    for name in tensors:
        layer, _, end = name.removeprefix("base_model.model.model.").rpartition(".lora_")
        if f"lora_{end}" not in PEFT_ENDS or not layer.startswith("layers."):
            raise ValueError(
                f"{folder / ADAPTER} has {name}; give an adapter of the projections of an export of target own"
            )
        factors[f"blocks.{layer.removeprefix('layers.')}.{PEFT_ENDS[f'lora_{end}']}"] = tensors[name].float()
    return factors, int(settings["r"]), float(settings["lora_alpha"])


ENTRY_POINTS = "amfm.adapters"


class Adapter(Protocol):
    """What a package brings."""

    def add_update(self, model: HybridModel, *, rank: int, alpha: float) -> list[str]:
        """Put updates that are zero at first into a model; returns the names of their parameters.

        None if no block has a place for them. No collectives; every rank calls this before an engine takes the model.
        Raises ValueError if ranks hold the weights in parts that it cannot update.
        """

    def merge_update(self, state: Mapping[str, Tensor], *, rank: int, alpha: float) -> Mapping[str, Tensor]:
        """Add the updates to their weights, and leave their parameters out: whole tensors by name."""


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter as configurations see it. name: lower case. adapter: `package.module:object`, an `Adapter`."""

    name: str
    adapter: str


def adapter_specs() -> dict[str, AdapterSpec]:
    """Collect the adapters of installed packages by name. Raises RuntimeError as mixers do."""
    return specs_by_name(ENTRY_POINTS, AdapterSpec, (), "an adapter")


def how_to_get(name: str) -> str:
    """What to do about an adapter that no package registers."""
    return how_to_install(name, f"install the package that registers it under {ENTRY_POINTS}")


def find_adapter(name: str) -> Adapter:
    """Import an adapter by its name."""
    return cast("Adapter", load_named(adapter_specs()[name].adapter))
