"""Weight maps between our checkpoints and others: entries that convert one tensor in both directions.

An entry holds both directions, so that export and import cannot disagree. A map names every tensor of both sides; a tensor
that is missing or unknown is an error and not skipped, because a model with a missing or an unread weight still runs and is
only worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from amfm.model.config.kinds import kind_of
from amfm.model.config.schema import ModelConfig
from amfm.model.on_demand import OnDemand, Shape, Source, cut_rows, on_demand

Form = Literal["same", "conv", "experts", "copy"]
# Mamba2 tensors are named alike in the native classes that have it, but for the convolution.
CONV_FORMS: dict[str, tuple[str, Form]] = {
    "conv.weight": ("conv1d.weight", "conv"),
    "conv.bias": ("conv1d.bias", "same"),
}
# Entries of a mixer, of the configuration, our prefix and that of the layer; and shapes that the class demands besides.
BlockEntries = Callable[[ModelConfig, str, str], Iterable["WeightEntry"]]
Zeros = dict[str, tuple[int, ...]]
Rows = tuple[int, int] | None  # start and stop in the first dimension; None: all


@dataclass(frozen=True)
class Piece:
    """A part of an entry that converts on its own: the entry of that part, and the rows of each tensor that belong to
    it.
    """

    entry: WeightEntry
    ours: Mapping[str, Rows]
    theirs: Mapping[str, Rows]


@dataclass(frozen=True)
class WeightEntry:
    """One of our tensors and its place in the other checkpoint.

    Forms: `same`; `conv` [C, W] <-> [C, 1, W]; `experts` [E, ...] <-> one tensor an expert; `copy` is a second place of a
    tied weight, which is written but not read back.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form = "same"

    def our_names(self) -> tuple[str, ...]:
        """Name every tensor of ours that the entry converts; `ours` is the first."""
        return (self.ours,)

    def pieces(self, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
        """Cut the entry into pieces of about BLOCK_NUMEL numbers; `shapes`: of our tensors.

        Row by row, and a stack of experts expert by expert; an entry whose rows change places cuts itself otherwise.
        """
        shape = shapes[self.ours]
        rows = shape[0] if shape else 1
        if self.form == "experts":
            each = len(self.theirs) // rows
            for start, stop in cut_rows(rows, shape):
                names = self.theirs[start * each : stop * each]
                yield Piece(replace(self, theirs=names), {self.ours: (start, stop)}, dict.fromkeys(names))
        elif not shape:
            yield self.whole_piece()
        else:
            for run in cut_rows(rows, shape):
                yield Piece(self, {self.ours: run}, {self.theirs[0]: run})

    def whole_piece(self) -> Piece:
        """The entry as one piece."""
        return Piece(self, dict.fromkeys(self.our_names()), dict.fromkeys(self.theirs))

    def write(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert our tensors (by name; at least this entry's) to theirs, by name."""
        return self.split(ours[self.ours])

    def read(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert their tensors (by name; at least this entry's) to ours, by name."""
        return {self.ours: self.join(theirs)}

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Convert our tensor to theirs, by name: views, made contiguous."""
        if self.form == "experts":
            assert tensor.shape[0] == len(self.theirs), (
                f"{self.ours}: {tensor.shape[0]} experts, {len(self.theirs)} names"
            )
            return {name: tensor[index].contiguous() for index, name in enumerate(self.theirs)}
        return {self.theirs[0]: (tensor.unsqueeze(1) if self.form == "conv" else tensor).contiguous()}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Convert their tensors (by name; at least this entry's) to ours."""
        if self.form == "experts":
            return torch.stack([tensors[name] for name in self.theirs])
        tensor = tensors[self.theirs[0]]
        return tensor.squeeze(1).contiguous() if self.form == "conv" else tensor


@dataclass(frozen=True)
class WeightMap:
    """All entries of a model, and the shapes of tensors that the class demands but our model lacks (all zeros).

    aliases: other names under which tensors of theirs are read, and those that they have here.
    """

    entries: tuple[WeightEntry, ...]
    zeros: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def their_names(self) -> set[str]:
        """Collect every tensor name of the other checkpoint."""
        return {name for entry in self.entries for name in entry.theirs} | set(self.zeros)

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a whole state of ours to their names. The names must be exactly those of the model."""
        expected = {name for entry in self.entries for name in entry.our_names()}
        assert expected == set(ours), f"weights differ from the map: {sorted(expected ^ set(ours))[:8]}"
        tensors: dict[str, Tensor] = {}
        for entry in self.entries:
            tensors.update(entry.write(ours))
        for name, shape in self.zeros.items():
            tensors[name] = torch.zeros(shape, dtype=torch.float32)
        return tensors

    def their_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of all tensors of theirs, from those of ours; no tensor is made."""
        ours = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {name: tuple(tensor.shape) for name, tensor in self.to_theirs(ours).items()}

    def stream_theirs(self, ours: OnDemand) -> Iterator[tuple[str, int, Tensor]]:
        """Convert a state piece by piece: yields the name of theirs, the number of the first row, and rows from there on."""
        for entry in self.entries:
            for piece in entry.pieces({name: ours.shape(name) for name in entry.our_names()}):
                converted = piece.entry.write({name: ours.rows(name, rows) for name, rows in piece.ours.items()})
                for name, tensor in converted.items():
                    rows = piece.theirs[name]
                    yield name, rows[0] if rows else 0, tensor
        for name, shape in self.zeros.items():
            for start, stop in cut_rows(shape[0], shape):
                yield name, start, torch.zeros(stop - start, *shape[1:])

    def to_ours(self, theirs: Mapping[str, Tensor]) -> OnDemand:
        """Convert a state of theirs to our names, in float32; tensors that are always zero are dropped.

        Nothing but shapes, zeros and copies is looked at before a tensor is asked for. Raises ValueError if a tensor is
        missing or not in the map, a zero tensor is not zero, or copies differ.
        """
        given = on_demand(theirs)
        given = OnDemand({self.aliases.get(name, name): source for name, source in given.sources.items()})
        missing, unknown = self.their_names() - set(given), set(given) - self.their_names()
        if missing or unknown:
            raise ValueError(
                f"the checkpoint's tensors are not those of its configuration: missing {sorted(missing)[:6]}, "
                f"unknown {sorted(unknown)[:6]}; check config.json"
            )
        for name in self.zeros:
            if any(bool(torch.count_nonzero(rows)) for _, rows in given.blocks(name)):
                raise ValueError(
                    f"{name} is not zero, and the model that the configuration describes has no such weight; where "
                    "amfm_model.json is next to the weights, remove it to read config.json instead"
                )
        sources: dict[str, Source] = {}
        for entry in self.entries:
            if entry.form != "copy":
                sources |= read_sources(entry, given)
        ours = OnDemand(sources)
        for entry in self.entries:
            if entry.form == "copy" and not _are_equal(given, entry.theirs[0], ours, entry.ours):
                raise ValueError(
                    f"{entry.theirs[0]} differs from {entry.ours}, so the embeddings are no longer tied; "
                    "remove amfm_model.json to import them as two tensors"
                )
        return ours


def read_sources(entry: WeightEntry, theirs: OnDemand) -> dict[str, Source]:
    """Our tensors of an entry as sources that read theirs. Shapes follow from theirs; no tensor is read."""
    given = {
        name: torch.empty(theirs.shape(name), dtype=theirs.sources[name].dtype, device="meta") for name in entry.theirs
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in entry.read(given).items()}
    return {
        name: Source(shape, torch.float32, partial(_read_rows, entry, name, shapes, theirs))
        for name, shape in shapes.items()
    }


def _read_rows(
    entry: WeightEntry, name: str, shapes: Mapping[str, Shape], theirs: OnDemand, start: int, stop: int
) -> Tensor:
    """Rows of one of our tensors, from the pieces that overlap them, in float32."""
    shape = shapes[name]
    read = torch.empty((stop - start, *shape[1:]) if shape else (), dtype=torch.float32)
    for piece in entry.pieces(shapes):
        first, last = piece.ours.get(name, (0, 0)) or (0, shape[0] if shape else 1)
        low, high = max(start, first), min(stop, last)
        if low < high:
            part = piece.entry.read({other: theirs.rows(other, rows) for other, rows in piece.theirs.items()})[name]
            if shape:
                read[low - start : high - start] = part[low - first : high - first]
            else:
                read.copy_(part)
    return read


def _are_equal(given: OnDemand, name: str, ours: OnDemand, our_name: str) -> bool:
    """Whether a second copy on their side is what was read as ours, block by block."""
    if given.shape(name) != ours.shape(our_name):
        return False
    return all(
        torch.equal(rows.float(), ours.rows(our_name, (start, start + len(rows)))) for start, rows in given.blocks(name)
    )


def paired_map(
    config: ModelConfig,
    blocks: Mapping[str, BlockEntries],
    *,
    zeros: Mapping[str, Callable[[ModelConfig, str], Zeros]] = MappingProxyType({}),
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    final: str = "norm",
    norm_entry: Callable[[str, tuple[str, ...]], WeightEntry] = WeightEntry,
    more: Iterable[WeightEntry] = (),
    copies_head: bool = False,
) -> WeightMap:
    """Map a class whose layers have two of our blocks each: what mixes tokens, then what mixes channels.

    blocks: entries of a mixer by its symbol, and `zeros` what the class demands of it besides, of the layer's prefix. norms:
    names of both norms of a layer, `final` of the last. more: entries before it. copies_head: the class never ties its head,
    which without a copy of its own would start at random.
    """
    entries, lacking = [WeightEntry("embedding.weight", ("model.embed_tokens.weight",))], Zeros()
    for index, symbol in enumerate(config.letters):
        ours, layer = f"blocks.{index}.", f"model.layers.{index // 2}."
        norm = norms[kind_of(symbol).mixes == "channels"]
        entries.append(norm_entry(f"{ours}norm.weight", (f"{layer}{norm}.weight",)))
        entries += blocks[symbol](config, f"{ours}mixer.", layer)
        if symbol in zeros:
            lacking |= zeros[symbol](config, layer)
    entries += [*more, norm_entry("final_norm.weight", (f"model.{final}.weight",))]
    if not config.tie_embeddings:
        entries.append(WeightEntry("head.weight", ("lm_head.weight",)))
    elif copies_head:
        entries.append(WeightEntry("embedding.weight", ("lm_head.weight",), "copy"))
    return WeightMap(tuple(entries), lacking)
