"""Bytes of PyTorch's operations between kernels, planned vs. seen in a pass over as many tokens as a rank's micro-batch has."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import amfm.launch.plan.blocks.measured as measured
from amfm.kernels.common.custom_op import find_body
from amfm.launch.plan.activations import storage_of
from amfm.launch.plan.blocks.block import block_cost
from amfm.launch.plan.blocks.cut import cut_of
from amfm.launch.plan.blocks.seen import LiveBytes
from amfm.launch.plan.layout import Layout
from amfm.pretrain.stages import resolve_stages
from tests.launch.plan.presets import PRESETS, headers, preset

TOLERANCE = 0.05
QUICK = ("qwen3_next_80b", "granite4_h_small")
PRODUCTS = {
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "linear",
    "_grouped_mm",
    "_scaled_mm",
    "_scaled_dot_product_flash_attention",
}
NOTHING = {"detach", "alias", "_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh"}
NOT_READ = {
    "zero_",
    "fill_",
    "copy_",
    "zeros",
    "zeros_like",
    "ones",
    "ones_like",
    "full",
    "new_zeros",
    "new_ones",
    "arange",
}
LOOKED_UP = {"index", "index_select", "gather", "embedding", "take"}


class Seen(LiveBytes):
    """Counts, in its own way, what each operation between products, kernels and exchanges reads and writes, by phase."""

    passes: ClassVar[Counter[str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        node = torch._C._current_autograd_node()
        keeps_leaf = node is not None and "AccumulateGrad" in node.name()
        name = func._opname
        is_ours = find_body(func) is not None or func.namespace != "aten"
        is_product = name in PRODUCTS or name.startswith("_scaled_dot_product")
        is_weight = (
            getattr(out, "shape", None) in self.stacked
        )  # a sum of gradients of experts' halves, which is a formula
        if not (is_ours or is_product or is_weight or func.is_view or keeps_leaf or name in NOTHING):
            written = [numbers(each) for each in listed(out)]
            read = [] if name in NOT_READ else [numbers(each) for each in listed(args)]
            if name == "copy_":
                read = [numbers(each) for each in listed(args[1:])]
            if name in LOOKED_UP:
                read = [*written, *(numbers(each) for each in listed(args[1:]))]
            self.passes["forward" if node is None else "backward"] += sum(written) + sum(read)
        return out


def listed(value: Any) -> list[Tensor]:
    """Tensors in arguments or results, the same one once."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    for each in value if isinstance(value, (list, tuple)) else ():
        found += [other for other in listed(each) if not any(other is known for known in found)]
    return found


def numbers(tensor: Tensor) -> int:
    """Bytes of a tensor without what a broadcast repeats."""
    places = [length for length, stride in zip(tensor.shape, tensor.stride()) if stride or length == 1]
    return tensor.itemsize * torch.Size(places).numel()


def of_preset(name: str) -> Any:
    """A preset as a parameter, slow but for two."""
    return pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("name", map(of_preset, PRESETS))
def test_bytes_between_kernels_are_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = headers(name)[0]
    config = resolve_stages(preset(name, ranks=header.gpus))[0].config
    layout, storage = Layout.of(config, header.gpus), storage_of(config)
    if storage.backend != "triton":
        pytest.skip("planned for PyTorch's operations, of which none are between kernels")
    tokens = layout.one_sub_batch().tokens(config)
    for symbol in dict.fromkeys(config.model.built_letters):
        cut = replace(cut_of(config, layout, symbol, 1.2), is_split=False)
        planned = block_cost(config, symbol, layout, storage, 1.2).between
        with monkeypatch.context() as patched:
            patched.setattr(measured, "LiveBytes", Seen)
            patched.setattr(Seen, "passes", Counter())
            measured._measure(
                measured.without_stretch(config.model), symbol, torch.bfloat16, "triton", cut, tokens=tokens
            )
            seen = Seen.passes
        for way, per_token in zip(("forward", "backward"), planned):
            # Up to 64 bytes per token are of what does not grow with them.
            assert tokens * per_token == pytest.approx(seen[way], rel=TOLERANCE, abs=64 * tokens), (symbol, way)
