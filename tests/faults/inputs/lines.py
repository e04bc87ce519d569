"""Wrong command lines of every verb, and outputs instead of which there is a link or something of others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from amfm.launch.verbs import VERBS
from tests.faults.inputs.folders import copy_run
from tests.faults.inputs.trial import PRECIOUS, Case

# Words after a verb. None of them is all that a verb needs, so each is rejected, or prints help.
WORDS: tuple[tuple[str, ...], ...] = (
    *(("--help",), ("-h", "--nonsense"), ("--nonsense",), ("--nonsense=1",), ("-z",), ("",), ("HERE/none",), ("/dev/null",)),
    *(("HERE/none", "--json"), ("--json", "--json", "HERE/none"), ("x" * 5000,), ("a\nb",), ("é漢",), ("HERE/loop",)),
    *(("HERE/none", "a", "b", "c", "d", "e", "=", "==", "a=b"),),
)  # fmt: skip
RUNS_ALONE = ("doctor", "init", "recipes", "study")  # which do something with less


def lines(place: Path) -> Iterator[Case]:
    def make(here: Path) -> None:
        (here / "loop").symlink_to("loop")

    for verb in VERBS:
        for words in WORDS if verb not in RUNS_ALONE else WORDS[:5]:
            yield Case(f"{verb} {' '.join(words)[:60]!r}", (verb, *words), make)
    for words in (
        (),
        ("",),
        ("nonsense",),
        ("--nonsense",),
        ("--version", "x"),
        ("-",),
        ("--",),
        ("Train",),
        ("x" * 5000,),
        ("\n",),
    ):
        yield Case(f"{words!r:.60}", words, make) if words else Case("nothing", ("--help",), make)


# What writes, with its output as HERE/out.
WRITERS: tuple[tuple[str, ...], ...] = (
    ("export", "HERE/in", "HERE/out", "--no-verify"),
    ("export", "HERE/in", "HERE/out", "--format", "dcp"),
    ("export", "HERE/in", "HERE/out", "--format", "deepspeed-universal"),
    ("export", "PLACE/store", "HERE/out", "--format", "megatron"),
    ("import", "PLACE/exported", "HERE/out"),
    ("import", "PLACE/bytes.tiktoken", "HERE/out", "--pattern", "."),
    ("merge", "HERE/in", "HERE/out", "--last", "1"),
    ("tasks", "PLACE/store", "HERE/out"),
)


def outputs(place: Path) -> Iterator[Case]:
    """Nothing of others is written, whatever the output is."""

    def link_to_file(here: Path) -> None:
        (here / "out").symlink_to(here.parent / PRECIOUS)

    def folder_of_links(here: Path) -> None:
        (here / "out").mkdir()
        names = ("config.json", "model.safetensors", ".metadata", "latest_universal", "tokenizer.json", "source0-train.bin", "source0-train.idx", "weights.json", ".writing-source0-train.idx")  # fmt: skip
        for name in names:
            (here / "out" / name).symlink_to(here.parent / PRECIOUS)

    def loop(here: Path) -> None:
        (here / "out").symlink_to("out")

    def below_file(here: Path) -> None:
        (here / "out").write_text("mine")

    def full(here: Path) -> None:
        (here / "out").symlink_to("/dev/full")

    for words in WRITERS:
        for make in (link_to_file, folder_of_links, loop, below_file, full):

            def both(here: Path, make: object = make) -> None:
                copy_run(place, here / "in")
                make(here)  # type: ignore[operator]

            given = tuple(word.replace("PLACE", str(place)) for word in words)
            yield Case(f"{' '.join(words)} at {make.__name__}", given, both)
