"""Do tests fail where the code is wrong? `python -m tests.mutation [ROOM ...]`, or `make test-mutation`.

Draws places in each room by a seed, makes the file wrong there in a copy of the repository, runs the room's tests until the
first fails, and writes a table of what was caught, by which test, and of what survived. A survivor that changes nothing that
can be seen stands in `equivalent.py` with the reason. Exits with 1 where fewer than 95% of the others are caught.

`--keep FILE` appends each verdict and, at the next call, takes those whose source is the same: a long run continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.rooms import ROOMS
from tests.mutation.workshop import Verdict, Workshop

# A hang is a catch, so the limit is far from what the tests of a room take on a busy machine.
HANG_SECONDS, HANG_FACTOR = 300.0, 10.0
WANTED = 0.95


@dataclass(frozen=True)
class Result:
    """What became of a mutant; `reason`: why nothing could catch it."""

    room: str
    source: str
    mutant: Mutant
    code: str
    caught: bool
    by: str

    @property
    def reason(self) -> str | None:
        """Why the change cannot be seen, for those known as equivalent."""
        return reason_of(self.source, self.code, self.mutant)


def reason_of(source: str, code: str, mutant: Mutant) -> str | None:
    """Why nothing can see a change of this line, for those known as equivalent."""
    return EQUIVALENT.get((source, code, mutant.before, mutant.after))


def draw(room: str, count: int, seed: int, folder: Path) -> list[tuple[str, Mutant]]:
    """This many mutants of a room's sources, in order of files and places: those whose digests are smallest.

    So other lines of a file leave the draw as it is, but for few.
    """
    found = []
    for source in ROOMS[room].sources:
        text = (folder / source).read_text()
        lines = text.splitlines()
        for mutant in mutants_of(text):
            name = f"{seed} {source} {lines[mutant.line - 1]} {mutant.before} {mutant.after}"
            found.append((hashlib.sha256(name.encode()).hexdigest(), source, mutant))
    chosen = sorted(found, key=lambda entry: entry[0])[:count]
    return [(source, mutant) for _, source, mutant in found if any(mutant is other for *_, other in chosen)]


def try_room(
    room: str, mutants: list[tuple[str, Mutant]], known: dict[str, Any], shop: Workshop, end: float
) -> Iterator[Result]:
    """Verdicts of a room's mutants, each a line of `known` by its key; sound tests must pass first.

    After `end` on the monotonic clock only those that are known.
    """
    limit: float | None = None
    for source, mutant in mutants:
        sound = (shop.folder / source).read_text()
        code = sound.splitlines()[mutant.line - 1].strip()
        key = hashlib.sha256(f"{source} {mutant} {sound}".encode()).hexdigest()[:16]
        if key not in known and time.monotonic() > end:
            continue
        if key not in known:
            if limit is None:
                passed = shop.run(ROOMS[room].tests, 3600.0)
                if passed.caught:
                    sys.exit(f"the tests of {room} fail without a change: {passed.by}\n{shop.log.read_text()[-3000:]}")
                limit = HANG_SECONDS + HANG_FACTOR * passed.seconds
                print(f"{room}: tests pass in {passed.seconds:.0f} s", flush=True)
            shop.write(source, mutant.apply(sound))
            verdict = shop.run(ROOMS[room].tests, limit)
            if not verdict.caught and ROOMS[room].wider and reason_of(source, code, mutant) is None:
                wider = shop.run(ROOMS[room].wider, 20 * limit)
                verdict = Verdict(wider.caught, f"wider: {wider.by}", verdict.seconds + wider.seconds)
            shop.write(source, sound)
            known[key] = [verdict.caught, verdict.by]
            print(f"{verdict.seconds:4.0f} s", end=" ", flush=True)
        caught, by = known[key]
        result = Result(room, source, mutant, code, caught, by)
        print(f"{'caught' if caught else 'SURVIVED'} {source}:{mutant.line} {describe(mutant)} -- {by}", flush=True)
        yield result


def describe(mutant: Mutant) -> str:
    """The change in one line."""
    before, after = (" ".join(text.split()) for text in (mutant.before, mutant.after))
    return f"{before} -> {after}"


def table(results: list[Result], num_drawn: int, seed: int) -> str:
    """The page of a run."""
    lines = ["# Mutants", "", PREFACE.format(seed=seed), ""]
    if len(results) < num_drawn:
        lines += [f"Not all were tried yet: {len(results)} of {num_drawn} that are drawn.", ""]
    lines += ["| room | mutants | caught | by wider tests | equivalent | survived |", "|---|---|---|---|---|---|"]
    rooms = [[result for result in results if result.room == room] for room in ROOMS]
    for name, group in [*zip(ROOMS, rooms), ("all", results)]:
        if group:
            caught = sum(result.caught for result in group)
            known = sum(not result.caught and result.reason is not None for result in group)
            wider = sum(result.caught and result.by.startswith("wider") for result in group)
            lines.append(f"| {name} | {len(group)} | {caught} | {wider} | {known} | {len(group) - caught - known} |")
    lines += ["", "## Not caught", "", "| place | change | why |", "|---|---|---|"]
    for result in results:
        if not result.caught:
            cells = f"{result.source}: `{result.code}`", f"`{describe(result.mutant)}`", result.reason or "**survived**"
            lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join(lines) + "\n"


BAR = "\\|"
PREFACE = """Written by `make test-mutation` (`python -m tests.mutation --seed {seed}`): wrong operators, constants, conditions and
dropped calls, drawn by the seed in rooms that promise correctness; caught means that a test fails: a quick one of the room, or,
where none did, one of the wider tests, some of them slow (which rooms, which tests: `tests/mutation/rooms.py`). Equivalent:
nothing that a test may ask for changes."""


def main() -> None:
    """Try the rooms, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"some of: {', '.join(ROOMS)} (all)")
    parser.add_argument("--count", type=int, default=13, help="mutants of each room (13)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="try no new ones after this many (no limit)")
    parser.add_argument("--keep", type=Path, help="verdicts, taken and added to")
    parser.add_argument("--out", type=Path, help="the table, as Markdown")
    given = parser.parse_args()
    unknown = set(given.rooms) - ROOMS.keys()
    if unknown:
        parser.error(f"no such room: {', '.join(sorted(unknown))}; there are {', '.join(ROOMS)}")
    known: dict[str, Any] = {}
    if given.keep is not None and given.keep.exists():
        known = dict(json.loads(line) for line in given.keep.read_text().splitlines())
    results, num_drawn, end = [], 0, time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder))
        for room in given.rooms or ROOMS:
            drawn = draw(room, given.count, given.seed, shop.folder)
            num_drawn += len(drawn)
            for result in try_room(room, drawn, known, shop, end):
                results.append(result)
                if given.keep is not None:
                    given.keep.write_text("".join(json.dumps(item) + "\n" for item in known.items()))
        shop.close()
    if given.out is not None:
        given.out.write_text(table(results, num_drawn, given.seed), encoding="utf-8")
    missed = [result for result in results if not result.caught and result.reason is None]
    counted = [result for result in results if result.caught or result.reason is None]
    print(f"{len(counted) - len(missed)} of {len(counted)} caught, {len(results) - len(counted)} equivalent")
    sys.exit(len(missed) > (1 - WANTED) * len(counted))


if __name__ == "__main__":
    main()
