"""Ranges of named parameters, as the files of a checkpoint hold them: whole parameters or any part of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# What is saved of each parameter: the float32 master weights and AdamW's two moments.
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


def check_tiling(name: str, shape: Sequence[int], ranges: Sequence[Sequence[Any]]) -> None:
    """Assert that ranges (start, numel, ...), sorted, cover a parameter exactly once."""
    end = 0
    for start, numel, *_ in ranges:
        assert start == end, f"parameter {name}: a range starts at {start}, the one before it ends at {end}"
        end += numel
    assert end == math.prod(shape), f"parameter {name}: ranges cover {end} of {math.prod(shape)} numbers"


class RangeReader:
    """Reads ranges of named parameters from the verified files of one checkpoint; opens each file once, when needed."""

    def __init__(self, checkpoint_dir: Path, manifest: dict[str, Any]) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.fragments = manifest["fragments"]
        self.open_files: dict[str, Any] = {}

    def file(self, name: str) -> Any:
        """An open handle of one tensor file."""
        if name not in self.open_files:
            handle: Any = safe_open(self.checkpoint_dir / name, framework="pt")
            self.open_files[name] = handle.__enter__()
        return self.open_files[name]

    def close(self) -> None:
        """Close all handles."""
        for handle in self.open_files.values():
            handle.__exit__(None, None, None)
        self.open_files.clear()

    def pieces(self, kind: str, name: str, start: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Saved pieces of one range: (offset inside the range, flat float32 values)."""
        for saved_start, saved_numel, file_name in self.fragments[name]:
            low, high = max(start, saved_start), min(start + numel, saved_start + saved_numel)
            if low < high:
                saved = self.file(file_name).get_slice(f"{kind}/{name}/{saved_start}")
                yield low - start, saved[low - saved_start : high - saved_start]

    def whole(self, kind: str, name: str, shape: Sequence[int]) -> Tensor:
        """One whole float32 tensor."""
        flat = torch.empty(math.prod(shape), dtype=torch.float32)
        self.fill(flat, kind, name, 0)
        return flat.view(tuple(shape))

    def fill(self, flat: Tensor, kind: str, name: str, start: int) -> None:
        """Copy the range of a parameter that begins at `start` into a flat view of its length."""
        filled = 0
        for offset, values in self.pieces(kind, name, start, flat.numel()):
            flat[offset : offset + values.numel()].copy_(values)
            filled += values.numel()
        assert filled == flat.numel(), f"{kind} of {name}: {filled} of {flat.numel()} numbers are in the checkpoint"
