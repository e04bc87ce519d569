"""Brings a published bug into a copy of the repository, and runs the test that should see it."""

from __future__ import annotations

from tests.mutation.workshop import Workshop
from tests.published.catalogue import Bug, Change

LIMIT_SECONDS = 900.0  # a test that hangs has seen it, too
# Tests that train many layouts in one set of processes: only the one that is asked for.
LAYOUTS = """
LAYOUTS = [layout for layout in LAYOUTS if layout.name == {name!r}]
VARIANTS = {{layout.model: VARIANTS[layout.model] for layout in LAYOUTS}}
"""


def narrow(shop: Workshop, test: str) -> list[Change]:
    """Changes of tests, in the copy, after which they compute what this one needs."""
    path, _, name = test.partition("[")
    if path.startswith("tests/parallel/test_layouts.py"):
        last = "# Blocks computed again in backward passes."
        text = (shop.folder / "tests/parallel/layouts.py").read_text(encoding="utf-8")
        tail = text[text.index(last) :]
        return [Change("tests/parallel/layouts.py", tail, tail + LAYOUTS.format(name=name[:-1]))]
    if path.endswith("test_mixers.py::test_two_ranks_compute_what_one_does"):
        loop = "    for kind in SECTIONS\n"
        return [Change(path.partition("::")[0], loop, loop + f'    if f"{{name}}-{{kind}}" == "{name[:-1]}"\n')]
    return []


def see(shop: Workshop, bug: Bug) -> tuple[bool, str]:
    """Whether the bug's test fails with it, and what failed or was printed."""
    sound: dict[str, str] = {}
    try:
        for change in (*narrow(shop, bug.test), *bug.plant):
            text = (shop.folder / change.file).read_text(encoding="utf-8")
            sound.setdefault(change.file, text)
            shop.write(change.file, change.apply(text))
        verdict = shop.run(("-m", "", bug.test), LIMIT_SECONDS)
    finally:
        for name, text in sound.items():
            shop.write(name, text)
    by_test = verdict.by.startswith(bug.test.partition("[")[0]) or verdict.by == "it hangs"
    return verdict.caught and by_test, f"{verdict.by} after {verdict.seconds:.0f} s"
