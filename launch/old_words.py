"""Verbs and options of before under their present names: the old word is read, with one message that names the new one."""

from __future__ import annotations

from collections.abc import Sequence

from amfm.launch.console import say

OLD_VERBS = {("bench", "card"): ("bench", "gpu"), ("corpus",): ("sample-data",), ("shrink",): ("compact",)}
OLD_OPTIONS = {
    "evaluate": {"--probe": "--synthetic"},
    "inspect": {"--keep": "--protect", "--release": "--unprotect"},
}
WITH_VALUE = "--plugins"  # of the options before a verb


def use_current_words(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with present names; says which ones were old."""
    words = list(arguments)
    first = next((at for at, word in enumerate(words) if is_verb(words, at)), len(words))
    for old, new in OLD_VERBS.items():
        if tuple(words[first : first + len(old)]) == old:
            words[first : first + len(old)] = new
            say(f"note: `amfm {' '.join(old)}` is called `amfm {' '.join(new)}` now; the old name still works")
    for old_option, option in OLD_OPTIONS.get(" ".join(words[first : first + 1]), {}).items():
        for at, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name == old_option:
                words[at] = option + equals + value
                say(f"note: {old_option} is called {option} now; the old name still works")
    return words


def is_verb(words: Sequence[str], at: int) -> bool:
    """Whether the word at a place is neither an option nor the value of one."""
    return not words[at].startswith("-") and (at == 0 or words[at - 1] != WITH_VALUE)
