"""The weight map of transformers' `qwen3_next`.

Exact both ways but for one thing: their norms are 1 + w, so that a norm of ours below 0.5 is rounded at 2^-24.

The class has gates that a model of ours may lack. They are written as zeros, and sigmoid(0) = 1/2 is made up for by doubling
the matrix after the gate, which is exact in floating point. On import such a gate must be zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from amfm.model.config.kinds import kind_of
from amfm.model.config.mixer_options import GatedDeltaNetOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.depths import qwen3_next_depth
from amfm.model.huggingface.entries import BlockEntries, Form, Piece, WeightEntry, WeightMap, Zeros, paired_map
from amfm.model.on_demand import Shape, cut_rows


@dataclass(frozen=True)
class NormEntry(WeightEntry):
    """A norm whose weight in the class is stored as an offset from one: ours is 1 + theirs."""

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        return {self.theirs[0]: tensor - 1.0}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return tensors[self.theirs[0]] + 1.0


@dataclass(frozen=True)
class DoubledEntry(WeightEntry):
    """A matrix after a gate that is one half everywhere: theirs is twice ours."""

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        return {self.theirs[0]: tensor * 2.0}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        return tensors[self.theirs[0]] * 0.5


@dataclass(frozen=True)
class QueryEntry(WeightEntry):
    """Query rows interleaved with the rows of a gate that we lack: of each head `head_dim` rows of queries, then zeros."""

    head_dim: int = 0

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """As in the base class, by whole heads."""
        yield from head_pieces(self, shapes, self.head_dim)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        queries_HKD = tensor.unflatten(0, (-1, self.head_dim))
        return {self.theirs[0]: torch.cat([queries_HKD, torch.zeros_like(queries_HKD)], dim=1).flatten(0, 1)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class; raises ValueError for a gate that does something."""
        queries_HKD, gate_HKD = tensors[self.theirs[0]].unflatten(0, (-1, 2 * self.head_dim)).chunk(2, dim=1)
        if not gate_HKD.is_meta and torch.count_nonzero(gate_HKD):
            raise ValueError(
                f"{self.theirs[0]} has an output gate, and the model that the configuration describes has none; remove "
                "amfm_model.json next to the weights to read config.json instead"
            )
        return queries_HKD.flatten(0, 1)


@dataclass(frozen=True)
class GatedQueryEntry(WeightEntry):
    """Of each head `head_dim` rows of queries, then as many of its gate, which is another tensor of ours."""

    gate: str = ""
    head_dim: int = 0

    def our_names(self) -> tuple[str, ...]:
        """As in the base class."""
        return self.ours, self.gate

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """As in the base class, by whole heads."""
        yield from head_pieces(self, shapes, self.head_dim)

    def write(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base class."""
        heads = [ours[name].unflatten(0, (-1, self.head_dim)) for name in self.our_names()]
        return {self.theirs[0]: torch.cat(heads, dim=1).flatten(0, 1)}

    def read(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base class."""
        halves = theirs[self.theirs[0]].unflatten(0, (-1, 2 * self.head_dim)).chunk(2, dim=1)
        return {name: half.flatten(0, 1) for name, half in zip(self.our_names(), halves, strict=True)}


def head_pieces(entry: WeightEntry, shapes: Mapping[str, Shape], head_dim: int) -> Iterator[Piece]:
    """Pieces of whole heads, of which theirs have twice the rows of each of ours."""
    shape = shapes[entry.ours]
    for start, stop in cut_rows(shape[0], shape, multiple=head_dim):
        yield Piece(entry, dict.fromkeys(entry.our_names(), (start, stop)), {entry.theirs[0]: (2 * start, 2 * stop)})


@dataclass(frozen=True)
class RowsEntry(WeightEntry):
    """Consecutive rows of ours, this many in each part, as tensors of which one may hold several parts.

    takes: the parts in each of theirs.
    """

    sizes: tuple[int, ...] = ()
    takes: tuple[tuple[int, ...], ...] = ()
    part_form: ClassVar[Form] = "same"

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """As in the base class, part by part: the rows of a part stay together."""
        for name, take in zip(self.theirs, self.takes, strict=True):
            theirs = 0
            for part in take:
                ours, size = sum(self.sizes[:part]), self.sizes[part]
                yield from part_pieces(WeightEntry(self.ours, (name,), self.part_form), shapes, size, ours, theirs)
                theirs += size

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        parts = tensor.split(list(self.sizes))
        return {name: torch.cat([parts[part] for part in take]) for name, take in zip(self.theirs, self.takes)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        parts: dict[int, Tensor] = {}
        for name, take in zip(self.theirs, self.takes):
            parts |= zip(take, tensors[name].split([self.sizes[part] for part in take]))
        return torch.cat([parts[part] for part in range(len(self.sizes))])


def part_pieces(entry: WeightEntry, shapes: Mapping[str, Shape], size: int, ours: int, theirs: int) -> Iterator[Piece]:
    """Pieces of `size` rows that stay together, from the rows `ours` and `theirs` on."""
    for start, stop in cut_rows(size, shapes[entry.ours]):
        yield Piece(
            entry, {entry.ours: (ours + start, ours + stop)}, {entry.theirs[0]: (theirs + start, theirs + stop)}
        )


@dataclass(frozen=True)
class GatedEntry(WeightEntry):
    """Gate rows above up rows, [.., 2 F, D], stored as two tensors; of experts as two tensors each."""

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """As in the base class; of one matrix half by half."""
        if self.form == "experts":
            yield from super().pieces(shapes)
            return
        size = shapes[self.ours][0] // 2
        for half, name in enumerate(self.theirs):
            yield from part_pieces(WeightEntry(self.ours, (name,)), shapes, size, half * size, 0)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        experts = tensor.unbind() if tensor.dim() == 3 else (tensor,)
        halves = [half.contiguous() for expert in experts for half in expert.chunk(2)]
        return dict(zip(self.theirs, halves, strict=True))

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        halves = [tensors[name] for name in self.theirs]
        if self.form != "experts":
            return torch.cat(halves)
        return torch.stack([torch.cat(halves[place : place + 2]) for place in range(0, len(halves), 2)])


@dataclass(frozen=True)
class DeltaEntry(WeightEntry):
    """Rows q, k, v, beta, decay, gate, stored as two tensors: q, k, v and gate by key head, and beta with decay.

    sizes: rows of one key head of q, k, v, beta, decay and gate.
    """

    sizes: tuple[int, ...] = ()

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """One piece: rows of a head stand apart in ours."""
        yield self.whole_piece()

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """As in the base class."""
        heads = len(tensor) // sum(self.sizes)
        parts = tensor.split([heads * size for size in self.sizes])
        q, k, v, beta, decay, gate = (part.unflatten(0, (heads, -1)) for part in parts)
        first, second = torch.cat([q, k, v, gate], dim=1), torch.cat([beta, decay], dim=1)
        return {self.theirs[0]: first.flatten(0, 1), self.theirs[1]: second.flatten(0, 1)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As in the base class."""
        first, second = (tensors[name] for name in self.theirs)
        keys, _, values, beta, decay, gate = self.sizes
        of_head = (keys, keys, values, gate)
        heads = len(first) // sum(of_head)
        q, k, v, z = first.unflatten(0, (heads, -1)).split(of_head, dim=1)
        b, a = second.unflatten(0, (heads, -1)).split((beta, decay), dim=1)
        return torch.cat([part.flatten(0, 1) for part in (q, k, v, b, a, z)])


NORMS = "input_layernorm", "post_attention_layernorm"


def delta_options(config: ModelConfig) -> GatedDeltaNetOptions:
    """Options of the Gated DeltaNet blocks, which the pattern has."""
    options: GatedDeltaNetOptions = getattr(config.mixers, "gated_deltanet")  # noqa: B009
    return options


def qwen3_next_map(config: ModelConfig, delta_entries: BlockEntries | None = None) -> WeightMap:
    """Build the weight map of a model that fits the class; `delta_entries`: of a Gated DeltaNet whose projections differ."""
    blocks = {"G": delta_entries or _delta_entries, "*": _attention_entries, "E": _expert_entries, "-": _dense_entries}

    def depth_entries(symbol: str, ours: str, theirs: str) -> Iterator[WeightEntry]:
        norm = NORMS[kind_of(symbol).mixes == "channels"]
        yield NormEntry(f"{ours}norm.weight", (f"{theirs}{norm}.weight",))
        yield from blocks[symbol](config, f"{ours}mixer.", theirs)

    depths = list(qwen3_next_depth(config, NormEntry, depth_entries))
    found = paired_map(config, blocks, zeros={"E": _gate_zeros}, norms=NORMS, norm_entry=NormEntry, more=depths)
    return replace(found, zeros={**found.zeros, **(_gate_zeros(config, "mtp.layers.0.") if depths else {})})


def _delta_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    options, theirs = delta_options(config), f"{layer}linear_attn."
    shared = options.num_heads // options.key_heads()
    values = shared * options.value_dim()
    sizes = (options.key_dim(), options.key_dim(), values, shared, shared, values)
    names = (f"{theirs}in_proj_qkvz.weight", f"{theirs}in_proj_ba.weight")
    yield DeltaEntry(f"{ours}in_proj.weight", names, sizes=sizes)
    yield from scan_entries(ours, theirs)


def scan_entries(ours: str, theirs: str) -> Iterator[WeightEntry]:
    """Entries of what follows the projections, alike in qwen3_5_moe."""
    yield WeightEntry(f"{ours}conv.weight", (f"{theirs}conv1d.weight",), "conv")
    for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight"):
        yield WeightEntry(ours + name, (theirs + name,))


def _attention_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    assert config.attention is not None, "the pattern has *, the configuration no attention section"
    theirs = f"{layer}self_attn."
    is_gated, head_dim = config.attention.gate != "none", config.attention.head_dim
    names = (f"{theirs}q_proj.weight",)
    if is_gated:
        yield GatedQueryEntry(f"{ours}q_proj.weight", names, gate=f"{ours}g_proj.weight", head_dim=head_dim)
    else:
        yield QueryEntry(f"{ours}q_proj.weight", names, head_dim=head_dim)
    for name in ("k_proj.weight", "v_proj.weight"):
        yield WeightEntry(ours + name, (theirs + name,))
    after_gate = WeightEntry if is_gated else DoubledEntry
    yield after_gate(f"{ours}o_proj.weight", (f"{theirs}o_proj.weight",))
    for name in ("q_norm.weight", "k_norm.weight"):
        yield NormEntry(ours + name, (theirs + name,))


def _dense_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    theirs = f"{layer}mlp."
    yield GatedEntry(f"{ours}up_proj.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"))
    yield WeightEntry(f"{ours}down_proj.weight", (f"{theirs}down_proj.weight",))


def _expert_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    assert config.moe is not None, "the pattern has E, the configuration no moe section"
    theirs = f"{layer}mlp."
    yield WeightEntry(f"{ours}router.weight", (f"{theirs}gate.weight",))
    yield from gated_experts(ours, theirs, config.moe.num_experts, ("gate_proj", "up_proj", "down_proj"))
    if config.moe.shared_expert_hidden_size:
        shared = f"{theirs}shared_expert."
        yield GatedEntry(f"{ours}shared.up_proj.weight", (f"{shared}gate_proj.weight", f"{shared}up_proj.weight"))
        after_gate = WeightEntry if config.moe.shared_expert_gate else DoubledEntry
        yield after_gate(f"{ours}shared.down_proj.weight", (f"{shared}down_proj.weight",))
    if config.moe.shared_expert_gate:
        yield WeightEntry(f"{ours}shared_gate.weight", (f"{theirs}shared_expert_gate.weight",))


def gated_experts(ours: str, theirs: str, num_experts: int, names: tuple[str, str, str]) -> Iterator[WeightEntry]:
    """Entries of the routed experts, stored one by one; `names`: of an expert's gate, up and down matrices."""
    experts, (*halves, down) = [f"{theirs}experts.{expert}." for expert in range(num_experts)], names
    gated = tuple(f"{expert}{half}.weight" for expert in experts for half in halves)
    yield GatedEntry(f"{ours}experts.up", gated, "experts")
    yield WeightEntry(f"{ours}experts.down", tuple(f"{expert}{down}.weight" for expert in experts), "experts")


def _gate_zeros(config: ModelConfig, layer: str) -> Zeros:
    """The gate of the shared expert where ours has none, and a shared expert of width 1 where we have none."""
    assert config.moe is not None, "the pattern has E, the configuration no moe section"
    theirs, width = f"{layer}mlp.", config.hidden_size
    if config.moe.shared_expert_gate:
        return {}
    zeros: Zeros = {f"{theirs}shared_expert_gate.weight": (1, width)}
    if not config.moe.shared_expert_hidden_size:
        zeros |= {f"{theirs}shared_expert.{name}_proj.weight": (1, width) for name in ("gate", "up")}
        zeros[f"{theirs}shared_expert.down_proj.weight"] = (width, 1)
    return zeros
