"""The weights of a conversion: the converted model before training, and what each stage made of it.

Frozen weights of a run in bf16 are rounded, the teacher's are not. So what a stage gives is its first weights with the
trained ones laid over them, and low-rank updates merged into the weights that the teacher had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.terminal import Report, silent
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.lora import merge_lora
from amfm.model.mixers.base import LinearMixer
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.routed_updates import ENDS
from amfm.pretrain.checkpoint.inspect import find_checkpoint, read_full_state
from amfm.pretrain.checkpoint.manifest_file import read_manifest
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.adamw import FROZEN
from amfm.pretrain.export.files import begin_export, put_in_place, sync_files
from amfm.pretrain.export.import_huggingface import MODEL_SECTION, describe_model
from amfm.pretrain.inference.weights import (
    Weights,
    function_settings,
    read_weights,
    require_same_function,
    write_weights,
)
from amfm.pretrain.startup.conversion import check_updates, find_adapter
from amfm_convert.stages import (
    WINDOW_LINEAR,
    ConversionStage,
    conversion_of,
    converted_blocks,
    converted_model,
    folder_of,
)


@dataclass(frozen=True)
class StartReport:
    """What became of the weights of converted blocks: taken from the teacher, new, and of the teacher without a place."""

    taken: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]


def read_teacher(config: RunConfig, report: Report = silent) -> Weights:
    """Read the teacher and compares it with the configuration's model and data.

    Raises ValueError for a model of a synthetic task, and for another model or tokenizer than the configuration's.
    """
    path = conversion_of(config).teacher
    teacher = read_weights(path, report)
    if teacher.given_tokenizer is None:
        raise ValueError(f"convert.teacher={path} was trained on a synthetic task; a conversion needs a model of text")
    identity = TokenStore.open(config.data.text_store()).tokenizer_identity
    require_same_function(teacher, config.model, identity, f"convert.teacher={path}")
    return teacher


def make_start(config: RunConfig, teacher: Weights) -> tuple[Weights, StartReport]:
    """Build the converted model in float32 and give it the teacher's weights, by name and shape.

    A linear mixer that stacks its projections takes q, k and v as parts of the stack, and the output projection under its
    own name, where their shapes agree. Raises ValueError if window_linear would not take all weights of a block.
    """
    model_config, convert = converted_model(config), conversion_of(config)
    model = HybridModel(model_config, single_rank_groups(), seed=config.train.seed)
    own = model.state_dict()
    taken: list[str] = []
    new: list[str] = []
    used: set[str] = set()
    for name, tensor in own.items():
        given = teacher.state.get(name)
        if given is not None and given.shape == tensor.shape:
            tensor.copy_(given)
            used.add(name)
            taken.append(name)
        else:
            new.append(name)
    for index in converted_blocks(config):
        used |= take_parts(model, index, teacher.state, own)
    places = tuple(f"blocks.{index}.mixer." for index in converted_blocks(config))
    left = tuple(name for name in teacher.state if name not in used and name.startswith(places))
    if convert.to == WINDOW_LINEAR and left:
        raise ValueError(
            f"convert.teacher={convert.teacher} has weights that window_linear does not support: {', '.join(left[:4])}; give "
            "model.mixers.window_linear the sizes of model.attention"
        )
    report = StartReport(
        tuple(name for name in taken if name.startswith(places)), tuple(n for n in new if n.startswith(places)), left
    )
    weights = Weights(
        model_config, own, teacher.given_tokenizer, f"conversion of {teacher.origin}", released=teacher.released
    )
    return weights, report


def take_parts(model: HybridModel, index: int, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> set[str]:
    """Fill parts of a linear mixer's stacked projections with the attention's of the same rows; returns those used."""
    mixer, place = model.blocks[index].mixer, f"blocks.{index}.mixer."
    used: set[str] = set()
    if not isinstance(mixer, LinearMixer):
        return used
    row = 0
    for part, (size, units) in mixer.parts().items():
        if units is None:
            continue
        name, rows = f"{place}{part}_proj.weight", own[f"{place}in_proj.weight"][row : row + size]
        if name in given and given[name].shape == rows.shape:
            rows.copy_(given[name])
            used.add(name)
        row += size
    name, output = f"{place}o_proj.weight", own[f"{place}out_proj.weight"]
    if name in given and given[name].shape == output.shape:
        output.copy_(given[name])
        used.add(name)
    return used


def write_start(config: RunConfig, report: Report = silent) -> StartReport:
    """Write `run.dir/start` where it is not there yet, and say what became of the weights of converted blocks.

    Raises ValueError for a teacher or updates of elsewhere that do not fit, and where run.dir holds another conversion.
    """
    tune = conversion_of(config).tune
    if tune is not None and tune.routing is not None and tune.routing.updates:
        check_updates(tune, converted_model(config).model_copy(update={"lora_mixer": tune.routed()}))
    teacher = read_teacher(config, report)
    start, found = make_start(config, teacher)
    folder = folder_of(config, "start")
    if not folder.exists():
        report("writing the converted model")
        write_folder(folder, start)
        return found
    before = read_weights(folder)
    ours, theirs = function_settings(start.model), function_settings(before.model)
    differing = [
        f"{name}: {theirs.get(name)} there" for name in ours | theirs if ours.get(name) != theirs.get(name)
    ] or ([] if before.origin == start.origin else [f"{before.origin}, now {start.origin}"])
    if differing:
        raise ValueError(
            f"run.dir={config.run.dir} holds another conversion: {'; '.join(differing)}; give run.dir another name"
        )
    return found


def write_folder(folder: Path, weights: Weights) -> None:
    """Write a weights folder whole or not at all, with the `model` section of a run that continues from it."""
    with begin_export(folder) as temporary:
        write_weights(temporary, weights)
        (temporary / MODEL_SECTION).write_text(describe_model(weights.model), encoding="utf-8")
        sync_files(temporary)
        put_in_place(temporary, folder)


def stage_weights(stage: ConversionStage, report: Report = silent) -> Weights:
    """The model that a finished stage gives: its first weights, the trained ones over them, updates merged."""
    convert = conversion_of(stage.config)
    first = read_weights(stage.initial, report)
    checkpoint = find_checkpoint(stage.run_dir, report)
    manifest = read_manifest(checkpoint)
    frozen = {name for name, entry in manifest["parameters"].items() if entry["group"] == FROZEN}
    state = read_full_state(checkpoint, report)
    # The first weights lack updates, also those that were brought from elsewhere and frozen.
    trained = {name: state[name] for name in state if name not in frozen or name.endswith(ENDS)}
    whole = {**first.state, **trained}
    tune = convert.tuning()
    given: Mapping[str, Tensor] = whole if tune.routing else merge_lora(whole, tune.alpha / tune.rank)
    for adapter in tune.adapters:
        given = find_adapter(adapter).merge_update(given, rank=tune.rank, alpha=tune.alpha)
    model: ModelConfig = stage.config.model
    if model.moe is not None and first.model.moe is not None:
        model = model.model_copy(update={"moe": first.model.moe, "variants": first.model.variants})
    if model.lora_mixer is not None:
        # What continues from these weights makes hard choices from its own first step.
        model = model.model_copy(update={"lora_mixer": model.lora_mixer.model_copy(update={"hard_from_step": None})})
    return replace(first, model=model, state=given, origin=f"{checkpoint} of a conversion", run=None, step=None)


def complete_stage(stage: ConversionStage, report: Report = silent) -> None:
    """Write what the next stage starts from; only after a finished transfer, other stages write nothing."""
    folder = stage.run_dir.parent / "transferred"
    if stage.name == "transfer" and not folder.exists():
        write_folder(folder, stage_weights(stage, report))
