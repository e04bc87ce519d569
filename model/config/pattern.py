"""The pattern string: which blocks a model has, in which order, and where a pipeline cuts it into pieces.

Grammar (spaces mean nothing):

    pattern = blocks { "/" blocks }
    blocks  = item { item }
    item    = letter | "{" name "}" | "|" | "(" blocks ")" [ repeat ] | "(" mixer { "&" mixer } ")" [ repeat ]
    mixer   = letter | "{" name "}"
    repeat  = ( "*" | "x" ) digits

Letters are Megatron's `M` Mamba2, `*` attention, `E` mixture of experts, `-` dense feed-forward; Hunyuan's `A`, `F` and
`D` mean `*`, `E` and `-`. Other sequence mixers stand under their name in braces, `{retnet}`, and some have a letter too.
Whether a name is registered is checked later (`model/config/checks.py`), so parsing needs no installed package. A `*` that
a digit follows is a repetition and must follow a `)`; every other `*` is an attention block. So `(ME)*8` is eight pairs,
`(ME)*E` is a pair, an attention block and an `E`, and `M*8` is rejected: a single letter is repeated as `(M)*8`. `(M&*)` is one
block, whose mixers read the same norm and are added (`model/mixers/parallel.py`): different kinds that mix tokens. Each `/`
begins an MTP layer (`model/mtp.py`) after the main blocks; all of them have the same blocks.

The parser keeps the position of every item, so that errors point at the character with a caret. Repetitions are expanded
while parsing and bounded (`MAX_BLOCKS`): nested ones could otherwise fill memory from a short string.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache

from amfm.model.config.kinds import CORE, LETTERS, PACKAGE_LETTERS, list_kinds
from amfm.model.config.plugins import SPEC_NAME

MAX_BLOCKS = 4096
MAX_NESTED = 64  # parentheses in parentheses
SHOWN_AROUND = 100  # characters on each side of a caret


@dataclass(frozen=True)
class Pattern:
    """Main blocks in order, as Megatron's letters or `{name}`; `piece_cuts`: the blocks at which a new piece of a pipeline starts.

    `depth_letters`: the blocks of each of the `num_depths` MTP layers.
    """

    letters: tuple[str, ...]
    piece_cuts: tuple[int, ...] = ()
    depth_letters: tuple[str, ...] = ()
    num_depths: int = 0

    def canonical(self) -> str:
        """Write the pattern in its one canonical spelling: letters if there are any, no repetition, `|` and `/`."""
        cuts = set(self.piece_cuts)
        main = "".join(("|" if index in cuts else "") + letter for index, letter in enumerate(self.letters))
        return main + self.num_depths * f"/{''.join(self.depth_letters)}"

    def counts(self) -> dict[str, int]:
        """Count the main blocks of each kind that occurs, in the order `M * E -`, then other mixers as they occur."""
        core = [kind.symbol for kind in CORE]
        kinds = [letter for letter in core if letter in self.letters]
        kinds += [letter for letter in dict.fromkeys(self.letters) if letter not in core]
        return {letter: self.letters.count(letter) for letter in kinds}

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """Split the letters at the cuts, one tuple for each piece of the pipeline; one piece without cuts."""
        edges = (0, *self.piece_cuts, len(self.letters))
        return tuple(self.letters[start:end] for start, end in itertools.pairwise(edges))


def block_kind(symbol: str) -> str:
    """Name of the kind of a symbol, under which its blocks are counted; it need not be registered."""
    kind = LETTERS.get(symbol)
    return kind.name if kind else symbol.strip("{}")


@lru_cache(maxsize=256)
def parse_pattern(text: str) -> Pattern:
    """Read a pattern string into its blocks; the same string is read once.

    Raises ValueError with the position, a caret under it and the rule if the text is not a pattern.
    """
    parser = _Parser(text)
    parser.check_nesting()
    items, end = parser.sequence(0, opened_at=None)
    assert end == len(text), f"the parser stopped at {end} of {len(text)}"
    slashes = [place for place, (symbol, _) in enumerate(items) if symbol == "/"]
    main = items[: slashes[0]] if slashes else items
    letters: list[str] = []
    cuts: list[int] = []
    for symbol, position in main:
        if symbol != "|":
            letters.append(symbol)
        elif len(letters) == (cuts[-1] if cuts else 0):
            raise parser.error(position, "a stage cut '|' needs a block before it; remove this one")
        else:
            cuts.append(len(letters))
    if not letters and slashes:
        raise parser.error(items[0][1], "a '/' begins an MTP layer after the main blocks, and there are none")
    if not letters:
        raise parser.error(0, f"a pattern needs at least one block: use some of {list_kinds()}")
    if cuts and cuts[-1] == len(letters):
        raise parser.error(main[-1][1], "a stage cut '|' needs a block after it; remove this one")
    depths = [parser.depth(items[start:end]) for start, end in itertools.pairwise([*slashes, len(items)])]
    for slash, depth in zip(slashes, depths):
        if depth != depths[0]:
            remedy = f"write /{''.join(depths[0])} for each of the {len(depths)}"
            raise parser.error(items[slash][1], f"all MTP layers have the blocks of the first; {remedy}")
    return Pattern(tuple(letters), tuple(cuts), depths[0] if depths else (), len(depths))


def explain_d(text: str) -> str | None:
    """Report that `D` was read as a dense feed-forward, where a pattern of Megatron's would mean its sparse attention.

    None if the pattern has no `D`, or a letter that only Hunyuan has (`A`, `F`) shows whose it is.
    """
    written = re.sub(r"\{[^}]*\}", "", text)
    if "D" not in written or set("AF") & set(written):
        return None
    return (
        f"pattern {text}: D is read as Hunyuan's dense feed-forward (-); among Megatron's symbols it is sparse attention (DSA), which "
        "there is none of here; write - for the feed-forward to have this unsaid"
    )


def parse_letters(text: str) -> frozenset[str]:
    """Read kinds of block named as in a pattern, in any order. Raises ValueError for what names no block."""
    symbols = [_one_spelling(symbol) for symbol in re.findall(r"\([^)]*\)|\{[^}]*\}|\S", text)]
    for symbol in symbols:
        if symbol not in LETTERS and not symbol.startswith(("{", "(")):
            raise ValueError(f"{symbol!r} is not a letter of a block; use some of {list_kinds()}")
    return frozenset(symbols)


def _one_spelling(symbol: str) -> str:
    """Map an alias, or the name of a kind that has a letter, to that letter: one spelling a block."""
    return _SPELLINGS.get(symbol, symbol)


_SPELLINGS = {letter: kind.symbol for letter, kind in LETTERS.items()}
_SPELLINGS |= {f"{{{kind.name}}}": kind.symbol for kind in LETTERS.values()} | PACKAGE_LETTERS


class _Parser:
    """Recursive descent over the text, one method a rule of the grammar.

    An item is a letter, `{name}` or `|` with the position it was written at. Methods take the position where their rule
    begins and return what they read, those of variable length also the position after it.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def error(self, position: int, rule: str) -> ValueError:
        """Build the error for a broken rule, with a caret under the character at `position`."""
        # Line breaks and tabs would move the caret away from its character.
        start = max(0, position - SHOWN_AROUND)
        shown = self.text[start : position + SHOWN_AROUND].replace("\n", " ").replace("\t", " ")
        return ValueError(f"pattern, character {position + 1}: {rule}\n  {shown}\n  {' ' * (position - start)}^")

    def check_nesting(self) -> None:
        """Reject parentheses that are nested deeper than the parser may go."""
        depth = 0
        for position, symbol in enumerate(self.text):
            depth += (symbol == "(") - (symbol == ")")
            if depth > MAX_NESTED:
                raise self.error(position, f"more than {MAX_NESTED} parentheses in each other; write them flatter")

    def depth(self, items: list[tuple[str, int]]) -> tuple[str, ...]:
        """Check the items of one MTP layer, its `/` first; returns its blocks."""
        (_, slash), *blocks = items
        if not blocks:
            raise self.error(slash, "a '/' begins an MTP layer and needs blocks after it; write /*E, or remove it")
        for symbol, position in blocks:
            if symbol == "|":
                raise self.error(position, "an MTP layer stays with the last stage; remove this '|'")
        return tuple(symbol for symbol, _ in blocks)

    def sequence(self, position: int, opened_at: int | None) -> tuple[list[tuple[str, int]], int]:
        """Read items from `position` to the `)` that closes `opened_at`, or to the end; returns them and where they end."""
        items: list[tuple[str, int]] = []
        while position < len(self.text):
            symbol = self.text[position]
            if symbol == ")" and opened_at is not None:
                return items, position
            if symbol == "&":
                raise self.error(position, "'&' joins two mixers that are the only ones in parentheses, as in (M&*)")
            if symbol.isspace():
                position += 1
                continue
            if symbol == "/":
                if opened_at is not None:
                    raise self.error(position, "a '/' stands outside of parentheses; write ME/*E/*E")
                items.append((symbol, position))
                position += 1
            elif symbol == "(":
                group, position = self.group(position)
                items += group
            elif symbol == "{":
                name, end = self.name(position)
                items.append((name, position))
                position = end
            else:
                items.append((self.letter(position), position))
                position += 1
            if len(items) > MAX_BLOCKS:
                raise self.error(position - 1, f"more than {MAX_BLOCKS} blocks; use a smaller repetition")
        if opened_at is not None:
            raise self.error(opened_at, "this parenthesis is never closed; add ')'")
        return items, position

    def group(self, opened_at: int) -> tuple[list[tuple[str, int]], int]:
        """Read a parenthesised sequence and apply its repetition; returns the items and the position after it."""
        items, closed_at = self.parallel(opened_at) or self.sequence(opened_at + 1, opened_at)
        if not items:
            raise self.error(opened_at, "empty parentheses; put blocks between them or remove them")
        position = closed_at + 1
        if not self.starts_repeat(position):
            return items, position
        end = position + 1
        while end < len(self.text) and self.is_digit(end):
            end += 1
        digits = self.text[position + 1 : end]
        # Nine digits are above MAX_BLOCKS anyhow; converting a longer number would cost time for nothing.
        times = int(digits[:9])
        if times == 0:
            raise self.error(position + 1, "a repetition of 0 leaves nothing; use 1 or more, or remove the parentheses")
        if len(digits) > 9 or times * len(items) > MAX_BLOCKS:
            raise self.error(position + 1, f"more than {MAX_BLOCKS} blocks; use a smaller repetition")
        return items * times, end

    def parallel(self, opened_at: int) -> tuple[list[tuple[str, int]], int] | None:
        """Read the parentheses of `(M&*)` as one item, and where they close; None if they hold blocks one after the other."""
        closed_at = self.text.find(")", opened_at)
        inside = self.text[opened_at + 1 : closed_at if closed_at > 0 else len(self.text)]
        if "&" not in inside or "(" in inside:
            return None
        if closed_at < 0:
            raise self.error(opened_at, "this parenthesis is never closed; add ')'")
        symbols, position = list[str](), opened_at + 1
        for part in inside.split("&"):
            begin = position + len(part) - len(part.lstrip())
            symbols.append(self.branch(begin, part.strip(), symbols))
            position += len(part) + 1
        return [(f"({'&'.join(symbols)})", opened_at)], closed_at

    def branch(self, position: int, text: str, before: list[str]) -> str:
        """Read one mixer of parallel ones, after those before it."""
        example = "an '&' stands between two mixers, as in (M&*)"
        if not text:
            raise self.error(position, example)
        symbol, end = self.name(position) if text[0] == "{" else (self.letter(position), position + 1)
        if end < position + len(text) or symbol == "|":
            raise self.error(min(end, position + len(text) - 1), f"{example}: one letter or {{name}} on each side")
        if symbol in LETTERS and LETTERS[symbol].mixes == "channels":
            raise self.error(position, f"parallel mixers are those of tokens, and {symbol!r} reads each on its own")
        if symbol in before:
            raise self.error(position, f"parallel mixers are of different kinds; remove this {symbol!r} out")
        return symbol

    def name(self, opened_at: int) -> tuple[str, int]:
        """Read a mixer in braces; returns its letter or `{name}`, and the position after it."""
        closed_at = self.text.find("}", opened_at)
        name = self.text[opened_at + 1 : closed_at if closed_at > 0 else None].strip()
        if closed_at < 0 or not SPEC_NAME.fullmatch(name):
            raise self.error(opened_at, "braces hold the name of a mixer in lower case, such as {retnet}")
        return _one_spelling(f"{{{name}}}"), closed_at + 1

    def letter(self, position: int) -> str:
        """Read the letter (or `|`) at this position, in Megatron's spelling."""
        symbol = self.text[position]
        if self.starts_repeat(position):
            raise self.error(
                position,
                f"{symbol!r} before a digit repeats a group and must follow ')'; write (M)x8 to repeat a block",
            )
        symbol = _one_spelling(symbol)
        if symbol in LETTERS or symbol == "|" or symbol.startswith("{"):
            return symbol
        if symbol == ")":
            raise self.error(position, "nothing to close here; remove ')' or add '(' before it")
        if self.is_digit(position):
            raise self.error(position, "a number must follow directly on ')*' or ')x', as in (ME)x8")
        raise self.error(position, f"no block is called {symbol!r}; blocks are {list_kinds()}")

    def starts_repeat(self, position: int) -> bool:
        """Whether a repetition stands here: without a digit after it, `*` is an attention block."""
        return self.text[position : position + 1] in ("*", "x") and self.is_digit(position + 1)

    def is_digit(self, position: int) -> bool:
        """Whether an ASCII digit stands here; str.isdigit would take digits of other scripts, and "" at the end."""
        return self.text[position : position + 1] in tuple("0123456789")
