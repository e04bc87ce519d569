"""The pattern string: which blocks a model has, in which order, and where pipeline stages are cut.

Grammar (spaces mean nothing):

    pattern = item { item }
    item    = letter | "|" | "(" pattern ")" [ repeat ]
    repeat  = ( "*" | "x" ) digits

Letters are Megatron's `M` Mamba2, `*` attention, `E` mixture of experts, `-` dense feed-forward; Hunyuan's `A`, `F` and
`D` mean `*`, `E` and `-`. A `*` that a digit follows is a repetition and must follow a `)`; every other `*` is an
attention block. So `(ME)*8` is eight pairs, `(ME)*E` is a pair, an attention block and an `E`, and `M*8` is refused: a
single letter is repeated as `(M)*8`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

# The section of a model's configuration that each kind of block reads.
SECTIONS = {"M": "mamba", "*": "attention", "E": "moe", "-": "feed_forward"}
BLOCK_NAMES = {"M": "Mamba2", "*": "attention", "E": "mixture of experts", "-": "dense feed-forward"}
HUNYUAN_LETTERS = {"A": "*", "F": "E", "D": "-"}
MAX_BLOCKS = 4096


@dataclass(frozen=True)
class Pattern:
    """Blocks in order, in Megatron's letters; `stage_cuts` are the block indices at which a new pipeline stage starts."""

    letters: tuple[str, ...]
    stage_cuts: tuple[int, ...] = ()

    def canonical(self) -> str:
        """The one spelling of this pattern: Megatron's letters without repetition, `|` at each stage cut."""
        cuts = set(self.stage_cuts)
        return "".join(("|" if index in cuts else "") + letter for index, letter in enumerate(self.letters))

    def counts(self) -> dict[str, int]:
        """Blocks of each letter that occurs, in the order `M * E -`."""
        return {letter: self.letters.count(letter) for letter in BLOCK_NAMES if letter in self.letters}

    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The letters of each pipeline stage; one stage without cuts."""
        edges = (0, *self.stage_cuts, len(self.letters))
        return tuple(self.letters[start:end] for start, end in itertools.pairwise(edges))


def parse_pattern(text: str) -> Pattern:
    """Reads a pattern string into its blocks.

    Raises ValueError with the position, a caret under it and the rule where the text is not a pattern.
    """
    parser = _Parser(text)
    items, end = parser.sequence(0, opened_at=None)
    assert end == len(text), f"the parser stopped at {end} of {len(text)}"
    letters: list[str] = []
    cuts: list[int] = []
    for symbol, position in items:
        if symbol != "|":
            letters.append(symbol)
        elif len(letters) == (cuts[-1] if cuts else 0):
            raise parser.error(position, "a stage cut '|' needs a block before it; remove this one")
        else:
            cuts.append(len(letters))
    if not letters:
        raise parser.error(0, "a pattern needs at least one block: M, * (A), E (F) or - (D)")
    if cuts and cuts[-1] == len(letters):
        raise parser.error(items[-1][1], "a stage cut '|' needs a block after it; remove this one")
    return Pattern(tuple(letters), tuple(cuts))


def parse_letters(text: str) -> frozenset[str]:
    """Kinds of block named by their letters, in any order, Hunyuan's too. Raises ValueError for other characters."""
    letters = [HUNYUAN_LETTERS.get(character, character) for character in text if not character.isspace()]
    for letter in letters:
        if letter not in BLOCK_NAMES:
            raise ValueError(f"{letter!r} is no letter of a block; use some of {' '.join(BLOCK_NAMES)}")
    return frozenset(letters)


class _Parser:
    """Recursive descent over the text; an item is a Megatron letter or `|` with the position it was written at."""

    def __init__(self, text: str) -> None:
        self.text = text

    def error(self, position: int, rule: str) -> ValueError:
        shown = self.text.replace("\n", " ").replace("\t", " ")
        return ValueError(f"pattern, character {position + 1}: {rule}\n  {shown}\n  {' ' * position}^")

    def sequence(self, position: int, opened_at: int | None) -> tuple[list[tuple[str, int]], int]:
        """Items from `position` to the closing parenthesis of `opened_at`, or to the end; and where they end."""
        items: list[tuple[str, int]] = []
        while position < len(self.text):
            symbol = self.text[position]
            if symbol == ")" and opened_at is not None:
                return items, position
            if symbol.isspace():
                position += 1
                continue
            if symbol == "(":
                group, position = self.group(position)
                items += group
            else:
                items.append((self.letter(position), position))
                position += 1
            if len(items) > MAX_BLOCKS:
                raise self.error(position - 1, f"more than {MAX_BLOCKS} blocks; use a smaller repetition")
        if opened_at is not None:
            raise self.error(opened_at, "this parenthesis is never closed; add ')'")
        return items, position

    def group(self, opened_at: int) -> tuple[list[tuple[str, int]], int]:
        """A parenthesised sequence with its repetition applied, and the position after it."""
        items, closed_at = self.sequence(opened_at + 1, opened_at)
        if not items:
            raise self.error(opened_at, "empty parentheses; put blocks between them or remove them")
        position = closed_at + 1
        if not self.starts_repeat(position):
            return items, position
        end = position + 1
        while end < len(self.text) and self.is_digit(end):
            end += 1
        digits = self.text[position + 1 : end]
        times = int(digits[:9])
        if times == 0:
            raise self.error(position + 1, "a repetition of 0 leaves nothing; use 1 or more, or remove the parentheses")
        if len(digits) > 9 or times * len(items) > MAX_BLOCKS:
            raise self.error(position + 1, f"more than {MAX_BLOCKS} blocks; use a smaller repetition")
        return items * times, end

    def letter(self, position: int) -> str:
        """The Megatron letter (or `|`) at this position."""
        symbol = self.text[position]
        if self.starts_repeat(position):
            raise self.error(
                position,
                f"{symbol!r} before a digit repeats a group and must follow ')'; write (M)x8 to repeat a block",
            )
        symbol = HUNYUAN_LETTERS.get(symbol, symbol)
        if symbol in BLOCK_NAMES or symbol == "|":
            return symbol
        if symbol == ")":
            raise self.error(position, "nothing to close here; remove ')' or add '(' before it")
        if self.is_digit(position):
            raise self.error(position, "a number must follow directly on ')*' or ')x', as in (ME)x8")
        raise self.error(position, f"no block is called {symbol!r}; blocks are M, * or A, E or F, - or D")

    def starts_repeat(self, position: int) -> bool:
        return self.text[position : position + 1] in ("*", "x") and self.is_digit(position + 1)

    def is_digit(self, position: int) -> bool:
        return self.text[position : position + 1] in tuple("0123456789")
