"""What a habit of transformers' users is tried on: an export as they have it, and a table of the habits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 400
# float32, the same products in other shapes.
FLOAT32 = 2e-5


@dataclass
class Exported:
    """An export's folder, and what `from_pretrained` needs for it."""

    target: str
    folder: Path
    scratch: Path
    arguments: dict[str, Any]
    _loaded: Any = field(default=None, repr=False)

    def load(self, auto: str = "AutoModelForCausalLM", **settings: Any) -> Any:
        """Load a model as a user does; in float32 unless told otherwise."""
        import transformers

        settings = {"dtype": torch.float32} | self.arguments | settings
        return getattr(transformers, auto).from_pretrained(self.folder, **settings)

    def model(self) -> Any:
        """One loaded model, which nothing changes."""
        if self._loaded is None:
            self._loaded = self.load().eval()
        return self._loaded

    def fresh(self) -> Any:
        """A copy of it to change."""
        return copy.deepcopy(self.model())

    def tokenizer(self) -> Any:
        """The tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, **self.arguments)

    def place(self, name: str) -> Path:
        """A folder to write to."""
        return self.scratch / name


@dataclass(frozen=True)
class Habit:
    """What users do, as a claim. needs: packages that must be installed. is_slow: takes seconds."""

    claim: str
    run: Callable[[Exported], None]
    needs: tuple[str, ...] = ()
    is_slow: bool = False


HABITS: dict[str, Habit] = {}


def habit(*needs: str, slow: bool = False) -> Callable[[Callable[[Exported], None]], Callable[[Exported], None]]:
    """Enter a function into the table; its name is the claim."""

    def enter(function: Callable[[Exported], None]) -> Callable[[Exported], None]:
        claim = function.__name__.replace("_", " ")
        assert claim not in HABITS, claim
        HABITS[claim] = Habit(claim, function, needs, slow)
        return function

    return enter


def tokens(rows: int = 2, length: int = 12, seed: int = 3) -> Tensor:
    """Token ids [rows, length] that are not padding."""
    return torch.randint(10, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = FLOAT32) -> None:
    """Compare relative to the largest number."""
    difference = float((actual.float() - expected.float()).detach().abs().max())
    assert difference <= tolerance * max(float(expected.detach().abs().max()), 1e-6), difference
