"""What a run that is a stage of a conversion trains: everything else is frozen before the engine takes the model."""

from __future__ import annotations

from amfm.model.hybrid import HybridModel
from amfm.model.lora import PROJECTIONS, add_lora
from amfm.model.mixers.window_linear import WindowLinearMixer
from amfm.pretrain.config.convert import ConvertConfig
from amfm.pretrain.convert.adapters import find_adapter
from amfm.pretrain.convert.updates import ROUTER_END, UPDATE_ENDS, take_updates


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


def converted_mixers(model: HybridModel, convert: ConvertConfig) -> list[WindowLinearMixer]:
    """The mixers of converted blocks held here that have their own branches."""
    held = [model.blocks[index].mixer for index in model.blocks.indices() if index in (convert.blocks or ())]
    return [mixer for mixer in held if isinstance(mixer, WindowLinearMixer)]


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
            if not (isinstance(mixer, WindowLinearMixer) and is_of_attention(name)):
                found.append(f"blocks.{index}.mixer.{name}")
    return found


def is_of_attention(name: str) -> bool:
    """Whether softmax attention has a weight of window_linear's too."""
    return name.partition(".")[0] in (*PROJECTIONS.values(), "g_proj", "q_norm", "k_norm")
