"""What the weight maps of transformers' `kimi_linear` and `deepseek_v3` share, exact both ways.

DeepSeek-V3 rotates neighbouring channels where ours rotate a channel of the first half with one of the second, so that rows
which give rotary channels change places (`RotaryEntry`): the released order, which every reader takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import BlockEntries, Piece, WeightEntry, WeightMap, Zeros, paired_map
from amfm.model.huggingface.latent.layers import LatentClass, mla_options
from amfm.model.huggingface.qwen3_next_weights import GatedEntry, gated_experts
from amfm.model.on_demand import Shape, cut_rows


@dataclass(frozen=True)
class RotaryEntry(WeightEntry):
    """Rows in `heads` equal groups, the last `rotary` of each for channels that theirs pair with neighbours, ours by halves.

    is_first: the first ones of each, not the last.
    """

    heads: int = 1
    rotary: int = 0
    is_first: bool = False

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """As in the base class, by whole heads."""
        shape = shapes[self.ours]
        each = shape[0] // self.heads
        for start, stop in cut_rows(shape[0], shape, multiple=each):
            part = replace(self, heads=(stop - start) // each)
            yield Piece(part, {self.ours: (start, stop)}, {self.theirs[0]: (start, stop)})

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        plain, turned = self._parts(tensor)
        first, second = turned.chunk(2, dim=1)
        paired = torch.stack([first, second], dim=2).flatten(1, 2)
        return {self.theirs[0]: self._whole(plain, paired)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        plain, turned = self._parts(tensors[self.theirs[0]])
        return self._whole(plain, torch.cat([turned[:, 0::2], turned[:, 1::2]], dim=1))

    def _parts(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        rows = tensor.unflatten(0, (self.heads, -1))
        sizes = [rows.shape[1] - self.rotary, self.rotary]
        first, second = rows.split(sizes[::-1] if self.is_first else sizes, dim=1)
        return (second, first) if self.is_first else (first, second)

    def _whole(self, plain: Tensor, turned: Tensor) -> Tensor:
        return torch.cat([turned, plain] if self.is_first else [plain, turned], dim=1).flatten(0, 1)


def latent_map(config: ModelConfig, kind: LatentClass, delta_entries: BlockEntries | None = None) -> WeightMap:
    """Build the weight map of a model that fits the class; `delta_entries`: of its Kimi Delta Attention, by our and their prefix."""
    aliases: dict[str, str] = {}

    def dense(config: ModelConfig, ours: str, layer: str) -> list[WeightEntry]:
        entries = list(_gated_entries(ours, f"{layer}mlp."))
        if kind.moe_place != "mlp":
            # transformers renames the mixtures of the release, and where it saves the dense layers with them.
            names = [name for entry in entries for name in entry.theirs]
            aliases.update({name.replace(".mlp.", f".{kind.moe_place}."): name for name in names})
        return entries

    def attending(build: BlockEntries) -> BlockEntries:
        return lambda config, ours, layer: build(config, ours, f"{layer}self_attn.")

    def experts(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
        return _expert_entries(config, ours, f"{layer}{kind.moe_place}.", kind.expert_matrices)

    blocks = {"+": attending(partial(_latent_entries, is_rotary=kind.positions == "rope")), "-": dense, "E": experts}
    if delta_entries is not None:
        blocks["K"] = attending(delta_entries)
    zeros = {"E": lambda config, layer: _expert_zeros(config, kind, f"{layer}{kind.moe_place}.")}
    return replace(paired_map(config, blocks, zeros=zeros, copies_head=not kind.ties_head), aliases=aliases)


def _latent_entries(config: ModelConfig, ours: str, theirs: str, *, is_rotary: bool) -> Iterator[WeightEntry]:
    options = mla_options(config)
    rotary = options.rope_head_dim if is_rotary else 0
    yield _rows(f"{ours}kv_down.weight", f"{theirs}kv_a_proj_with_mqa.weight", 1, rotary)
    yield WeightEntry(f"{ours}kv_norm.weight", (f"{theirs}kv_a_layernorm.weight",))
    yield WeightEntry(f"{ours}kv_up.weight", (f"{theirs}kv_b_proj.weight",))
    has_latent = options.query_latent_size is not None
    if has_latent:
        yield WeightEntry(f"{ours}q_down.weight", (f"{theirs}q_a_proj.weight",))
        yield WeightEntry(f"{ours}q_norm.weight", (f"{theirs}q_a_layernorm.weight",))
    query = f"{theirs}{'q_b_proj' if has_latent else 'q_proj'}.weight"
    yield _rows(f"{ours}q_proj.weight", query, options.num_heads, rotary)
    if options.gate != "none":
        yield WeightEntry(f"{ours}g_proj.weight", (f"{theirs}g_proj.weight",))
    yield WeightEntry(f"{ours}out_proj.weight", (f"{theirs}o_proj.weight",))


def _rows(ours: str, theirs: str, heads: int, rotary: int) -> WeightEntry:
    return RotaryEntry(ours, (theirs,), heads=heads, rotary=rotary) if rotary else WeightEntry(ours, (theirs,))


def _gated_entries(ours: str, theirs: str) -> Iterator[WeightEntry]:
    yield GatedEntry(f"{ours}up_proj.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"))
    yield WeightEntry(f"{ours}down_proj.weight", (f"{theirs}down_proj.weight",))


def _expert_entries(config: ModelConfig, ours: str, theirs: str, names: tuple[str, str, str]) -> Iterator[WeightEntry]:
    """Entries of a mixture; `names`: of an expert's gate, up and down matrices."""
    assert config.moe is not None, "the pattern has E, the configuration no moe section"
    yield WeightEntry(f"{ours}router.weight", (f"{theirs}gate.weight",))
    if config.moe.expert_bias:
        yield WeightEntry(f"{ours}expert_bias", (f"{theirs}gate.e_score_correction_bias",))
    yield from gated_experts(ours, theirs, config.moe.num_experts, names)
    if config.moe.shared_expert_hidden_size:
        yield from _gated_entries(f"{ours}shared.", f"{theirs}shared_experts.")


def _expert_zeros(config: ModelConfig, kind: LatentClass, theirs: str) -> Zeros:
    """What the classes always have: a sigmoid's routing bias, and a shared expert as wide as one routed expert."""
    moe, width = config.moe, config.hidden_size
    assert moe is not None, "the pattern has E, the configuration no moe section"
    zeros = Zeros()
    if not moe.expert_bias and kind.router == "sigmoid":
        zeros[f"{theirs}gate.e_score_correction_bias"] = (moe.num_experts,)
    if not moe.shared_expert_hidden_size:
        zeros |= {
            f"{theirs}shared_experts.{name}_proj.weight": (moe.expert_hidden_size, width) for name in ("gate", "up")
        }
        zeros[f"{theirs}shared_experts.down_proj.weight"] = (width, moe.expert_hidden_size)
    return zeros
