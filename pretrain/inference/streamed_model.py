"""A model that holds the weights of one block at a time, for passes over models that are larger than memory.

It is built on the meta device. When a pass comes to a part (`HybridModel.before_use`), the part gets memory and its weights
are read, and those of the blocks before it are let go. A pass so costs a read of the whole model: right for a
verification over some rows, wrong for anything that is repeated.
"""

from __future__ import annotations

from torch import nn

from amfm.model.hybrid import HybridModel
from amfm.model.mixers.interface import Mixer
from amfm.model.on_demand import OnDemand, on_demand
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.inference.weights import Weights


def stream_model(weights: Weights) -> HybridModel:
    """Build the whole model on one rank on the CPU, in float32 and eval mode, its weights read part by part in each pass."""
    model = HybridModel(weights.model, single_rank_groups(), device="meta").eval()
    state = on_demand(weights.state)
    # The ends are kept: a tied embedding is the head too.
    ends = {"embedding": ("embedding",), "head": ("final_norm", "final_stream", "head")}

    def take(part: str) -> None:
        for block in model.blocks:
            block.to("meta")
        for name in ends.get(part, (part,)):
            module = model.get_submodule(name) if model_has(model, name) else None
            if module is not None and any(tensor.is_meta for tensor in module.parameters()):
                materialize(module, name, state)

    model.before_use = take
    return model


def model_has(model: HybridModel, name: str) -> bool:
    """Whether a part of this name was built: a model of tied weights has no head."""
    return "." in name or getattr(model, name) is not None


def materialize(module: nn.Module, name: str, state: OnDemand) -> None:
    """Give a module on the meta device memory, first values of its buffers, and its weights by their global names."""
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, Mixer):
            part.reset_buffers()
    for own, tensor in module.state_dict().items():
        for start, rows in state.blocks(f"{name}.{own}"):
            (tensor[start : start + len(rows)] if rows.dim() else tensor).copy_(rows)
