"""Names of parameters in a universal checkpoint: ours, as any program has them that holds a model of ours under DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from amfm.model.on_demand import Shape, Source
from amfm.pretrain.exchange.rows import unflatten


class OwnNames:
    """Parameters under our own names: every tensor as it is. Models of other programs have names and forms of theirs."""

    def theirs(self, name: str) -> str:
        """The name of the folder where a parameter of ours is."""
        return name

    def write(self, ours: Mapping[str, Source]) -> dict[str, Source]:
        """Their tensors, of weights or of one kind of moments."""
        return dict(ours)

    def extras(self, name: str) -> dict[str, Any]:
        """What a file says next to the tensor of their name."""
        return {}

    def read(self, theirs: Mapping[str, Source], shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Source]]:
        """Iterate over our tensors of a folder, by our names; what it lacks is left out, and what was saved flat has its shape."""
        for name, shape in shapes.items():
            if name in theirs:
                yield name, unflatten(theirs[name], shape)
