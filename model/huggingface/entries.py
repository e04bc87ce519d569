"""Weight maps between our checkpoints and others: entries that convert one tensor in both directions.

An entry holds both directions, so that export and import cannot disagree. A map names every tensor of both sides; a tensor
that is missing or unknown is an error and not skipped, because a model with a missing or an unread weight still runs and is
only worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Form = Literal["same", "conv", "experts", "copy"]


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

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a whole state of theirs to our names; tensors that are always zero are dropped.

        Raises ValueError where a tensor is missing or not in the map, a zero tensor is not zero, or copies differ.
        """
        theirs = {self.aliases.get(name, name): tensor for name, tensor in theirs.items()}
        missing, unknown = self.their_names() - set(theirs), set(theirs) - self.their_names()
        if missing or unknown:
            raise ValueError(
                f"the checkpoint's tensors are not those of its configuration: missing {sorted(missing)[:6]}, "
                f"unknown {sorted(unknown)[:6]}; check config.json"
            )
        for name in self.zeros:
            if torch.count_nonzero(theirs[name]):
                raise ValueError(
                    f"{name} is not zero, and the model that the configuration describes has no such weight; where "
                    "amfm_model.json lies beside the weights, remove it to read config.json instead"
                )
        ours: dict[str, Tensor] = {}
        for entry in self.entries:
            if entry.form != "copy":
                ours.update(entry.read(theirs))
        for entry in self.entries:
            if entry.form == "copy" and not torch.equal(theirs[entry.theirs[0]], ours[entry.ours]):
                raise ValueError(
                    f"{entry.theirs[0]} differs from {entry.ours}, so the embeddings are no longer tied; "
                    "remove amfm_model.json to import them as two tensors"
                )
        return ours
