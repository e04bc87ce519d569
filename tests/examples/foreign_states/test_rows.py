"""Tensors of rows of others give the same numbers however few rows are asked for."""

from __future__ import annotations

import torch
from amfm_foreign_states.rows import interleave, pad, part_of, unflatten

from amfm.model.on_demand import source_of


def test_what_is_fused_padded_and_flat_is_read_by_any_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, 3, generator=generator) for rows in (12, 4, 4)]
    sources = [source_of(part) for part in parts]
    fused = interleave(sources, 4)
    # A block: three rows of the first, one of each of the others.
    assert torch.equal(fused.read(0, 5), torch.cat([parts[0][:3], parts[1][:1], parts[2][:1]]))
    for index, part in enumerate(parts):
        assert torch.equal(part_of(fused, [12, 4, 4], index, 4).read(1, 4), part[1:4])
    assert part_of(sources[0], [12, 4, 4], 0, 4) is sources[0], "another shape is left for the comparison of shapes"
    padded = torch.cat([parts[0], torch.zeros(3, 3)])
    assert torch.equal(pad(sources[0], 15).read(10, 14), padded[10:14])
    assert torch.equal(unflatten(source_of(parts[0].flatten()), (12, 3)).read(5, 9), parts[0][5:9])
