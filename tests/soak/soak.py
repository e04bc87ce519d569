"""Rounds of the soak: a run is hurt and started again until it is done, then compared with the same run undisturbed.

A round trains one layout. Faults strike it one after the other, each start ends as its fault says or the soak has failed,
and the next start continues from what is there; no one helps. When the time is up the round continues undisturbed to
its end. Then every step's loss, gradient norm, learning rate and tokens, and every number of the last checkpoint, must
be those
of a run that no one hurt: bitwise equal.

Everything is drawn from the seed and the round's number, so a round can be done again on its own. The clock stands still while
a layout runs undisturbed: the time asked for is time under faults.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.launcher_protocol import DONE
from tests.soak.compare import compare, is_finished
from tests.soak.faults import FAILED, Fault, draw_faults
from tests.soak.settings import LAYOUTS, STEPS, Layout, make_store, write_config
from tests.soak.start import Start, read_place, read_starts, wait_for, wait_for_end
from tests.soak.strike import damage_newest, strike

STUCK_SECONDS = 900.0  # a start on a machine that does other work too


@dataclass
class Strike:
    """A fault that was done. `seconds`: since the soak began; `step`: the newest that was logged; `starts`: so far.

    Of a fault that ends the start: `code`, how the launcher ended (None if it started the ranks again on its own),
    and `resumed_at`, the step from which the run continued.
    """

    kind: str
    hit: str
    seconds: float
    step: int
    starts: int
    code: int | None = None
    resumed_at: int | None = None


@dataclass
class Round:
    """What happened in a round. `trail`: (seconds since the soak began, step). `differences`: from the undisturbed run.

    `ended`: whether it came to its last step and was compared; a round that went wrong did not.
    """

    number: int
    layout: str
    starts: int = 0
    seconds: float = 0.0
    strikes: list[Strike] = field(default_factory=list)
    trail: list[tuple[float, int]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    ended: bool = False


@dataclass
class Soak:
    """A soak under way, in a separate folder. `seconds`: under faults. `rounds`: so far, the last one may be under
    way.
    """

    folder: Path
    seed: int
    seconds: float
    report: Callable[[str], None]
    rounds: list[Round] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    until: float = 0.0
    data: DataConfig | None = None

    def run(self, only: int | None = None, layouts: Sequence[Layout] = LAYOUTS) -> None:
        """Do rounds until the time is up, one at least, or the one given. Raises RuntimeError if one goes wrong."""
        self.data = make_store(self.folder / "data")
        self.until = time.monotonic() + self.seconds
        for number in itertools.count() if only is None else [only]:
            if self.rounds and time.monotonic() > self.until:
                break
            self.run_round(number, layouts[(number + self.seed) % len(layouts)])

    def run_round(self, number: int, layout: Layout) -> None:
        """Do one round; raises RuntimeError if a start ends otherwise than its fault says."""
        straight = self.straight_run(layout)
        began, found = time.monotonic(), Round(number, layout.name)
        self.rounds.append(found)
        run_dir = self.folder / f"round-{number:03d}"
        assert self.data is not None, "the store is made before rounds begin"
        config = write_config(self.data, layout, run_dir)
        faults = draw_faults(self.seed, number, layout.kinds, layout.num_ranks)
        while not is_finished(run_dir):
            start = Start.begin(layout, config, run_dir, self.folder / "switches", found.starts)
            found.starts += 1
            try:
                self.hurt(start, faults, found)
            finally:
                start.kill()
                found.trail += [(moment - self.began, step) for moment, step in start.trail]
        found.differences = compare(straight, run_dir)
        found.ended = True
        found.seconds = time.monotonic() - began
        look_back(found, layout, run_dir)
        verdict = "; ".join(found.differences) or "bitwise equal"
        self.report(f"round {number} ({layout.name}): {len(found.strikes)} faults, {found.starts} starts: {verdict}")

    def hurt(self, start: Start, faults: Iterator[Fault], found: Round) -> None:
        """Let faults strike a start until it ends, and judge how it does."""
        last: Fault | None = None
        starts, at_step = read_place(start.run_dir).starts, 0
        while start.code() is None:
            if time.monotonic() > self.until or (last is not None and last.kind.codes):
                wait_for_end(start, STUCK_SECONDS)
                break
            fault = next(faults)
            if not wait_for(start, starts, at_step, fault.new_steps, STUCK_SECONDS):
                break
            time.sleep(fault.delay_seconds)
            before = read_place(start.run_dir)
            moment, hit = time.monotonic() - self.began, strike(fault, start)
            last = fault
            found.strikes.append(Strike(fault.kind.name, hit, moment, before.step, before.starts))
            self.report(f"round {found.number} ({found.layout}): {fault.kind.name} ({hit}) at step {before.step}")
            # The next one counts steps from here, or those of the start that the launcher makes on its own.
            starts, at_step = (before.starts, 0) if fault.kind.new_start else (starts, before.step)
        self.judge(start, last, found)
        if last is not None and last.kind.name == "damage the newest checkpoint":
            self.report(f"round {found.number}: damaged {damage_newest(start.run_dir, last.draw)}")

    def judge(self, start: Start, last: Fault | None, found: Round) -> None:
        """Compare a start's end with what its last fault says. Raises RuntimeError if they differ."""
        code = start.code()
        orphans = start.clear_away()
        log = f"{start.run_dir}-start-{found.starts - 1:03d}.log"
        if orphans:
            raise RuntimeError(f"{len(orphans)} ranks outlived their launcher by a minute; see {log}")
        expected: tuple[int, ...] = ()
        if last is not None:
            # Of its own accord a launcher gives up after two failures without a checkpoint between them.
            expected = FAILED if last.kind.new_start else last.kind.codes
            found.strikes[-1].code = code if expected else None
        # A fault may come too late to hurt: what is finished is compared, however its launcher ended.
        if is_finished(start.run_dir) and (code == DONE or expected):
            return
        if code not in expected:
            why = f"after '{last.kind.name}'" if last is not None else "though no one hurt it"
            wanted = " or ".join(map(str, expected)) or "to be gone through"
            raise RuntimeError(
                f"round {found.number} ({found.layout}) ended with {code} at step {read_place(start.run_dir).step} {why} "
                f"(expected: {wanted}); see {log}"
            )

    def straight_run(self, layout: Layout) -> Path:
        """Run a layout undisturbed, unless that was done before, and return its directory; the clock stands meanwhile."""
        run_dir = self.folder / f"straight-{LAYOUTS.index(layout)}"
        if is_finished(run_dir):
            return run_dir
        assert self.data is not None, "the store is made before rounds begin"
        began = time.monotonic()
        config = write_config(self.data, layout, run_dir)
        start = Start.begin(layout, config, run_dir, self.folder / "switches", 0)
        try:
            wait_for_end(start, STUCK_SECONDS)
        finally:
            start.kill()
        if not is_finished(run_dir):
            raise RuntimeError(f"the undisturbed run of {layout.name} failed; see {run_dir}-start-000.log")
        seconds = time.monotonic() - began
        self.until += seconds
        self.report(f"{layout.name}: undisturbed, {STEPS} steps in {seconds:.0f} s")
        return run_dir


def look_back(found: Round, layout: Layout, run_dir: Path) -> None:
    """Fill in what the log says of starts: how many, those of launchers too, and where the run continued after a
    fault.
    """
    began_at = read_starts(run_dir)
    found.starts = max(found.starts, len(began_at))
    ending = {kind.name for kind in layout.kinds if kind.codes or kind.new_start}
    for struck in found.strikes:
        if struck.kind in ending and struck.starts < len(began_at):
            struck.resumed_at = began_at[struck.starts]
