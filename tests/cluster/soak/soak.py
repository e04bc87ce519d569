"""Runs one after the other on a cluster of four nodes, hurt every two minutes; an operator repairs nodes and submits again.

A run ends when Slurm says so. Then each step's loss, and every number of the last checkpoint, must be those of a run of two
ranks that nothing disturbed, bitwise; nothing may be left; and the goodput that the run reports is compared with what an
onlooker saw. What the operator had to submit again is in the table.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.cluster.cluster import Cluster, amfm, cluster, metrics
from tests.cluster.soak.faults import Fault, draw_faults
from tests.cluster.soak.injector import Goodput, Onlooker, compare_goodput
from tests.cluster.soak.site import NUM_NODES, PAUSE_SECONDS, STEPS, Site, mount_disk, write_run
from tests.cluster.soak.strike import strike
from tests.soak.compare import compare, is_finished

EVERY_SECONDS = 120.0
POLL_SECONDS = 0.25
ASK_SECONDS = 1.5
STUCK_SECONDS = 1200.0
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


@dataclass
class Strike:
    """A fault that was done. `seconds`: since the soak began; `again`, `without`: steps done again, and seconds without one.

    `submitted`: with what state the job had ended, where someone had to submit it again.
    """

    kind: str
    hit: str
    seconds: float
    step: int
    starts: int
    again: int | None = None
    without: float | None = None
    submitted: str = ""


@dataclass
class Round:
    """One run under faults. `trail`: (seconds since the soak began, step)."""

    number: int
    layout: str = ""
    strikes: list[Strike] = field(default_factory=list)
    trail: list[tuple[float, int]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    goodput: Goodput | None = None
    starts: int = 0
    seconds: float = 0.0
    ended: bool = False


@dataclass
class Soak:
    """A soak under way in a folder with a short path."""

    folder: Path
    seed: int
    seconds: float
    report: Callable[[str], None]
    rounds: list[Round] = field(default_factory=list)
    began: float = 0.0
    struck: float = 0.0

    def run(self) -> None:
        """Do runs until the time is up. Raises RuntimeError if one makes no progress."""
        straight = self.run_straight()
        mount_disk(self.folder / "disk")
        (self.folder / "clock").touch()
        faults = draw_faults(self.seed)
        try:
            with cluster(NUM_NODES, "slurm", folder=self.folder / "s", options=("2", "5000")) as nodes:
                self.began = time.monotonic()
                while not self.rounds or self.time_left() > 0:
                    found = Round(len(self.rounds), f"run {len(self.rounds)}")
                    self.rounds.append(found)
                    self.run_round(nodes, found, straight, faults)
        finally:
            subprocess.run(["umount", "--lazy", str(self.folder / "disk")], check=True)

    def time_left(self) -> float:
        """Seconds for which faults still strike."""
        return self.seconds - (time.monotonic() - self.began)

    def run_straight(self) -> Path:
        """The same run on two ranks of this machine, without pauses and faults."""
        root = self.folder / "straight"
        write_run(self.folder, root / "run", 0.0)
        began = time.monotonic()
        with (self.folder / "straight.log").open("wb") as log:
            subprocess.run(amfm("train", root / "run.yaml", "--nproc", "2"), check=True, stdout=log, stderr=log)
        self.report(f"undisturbed: {STEPS} steps in {time.monotonic() - began:.0f} s")
        return root / "run"

    def run_round(self, nodes: Cluster, found: Round, straight: Path, faults: Iterator[Fault]) -> None:
        """Do one run from its submission to its end."""
        root = self.folder / "disk" / f"{found.number}"
        write_run(self.folder, root / "run", PAUSE_SECONDS)
        site, onlooker, began = Site(nodes, self.folder, root), Onlooker(), time.monotonic()
        site.submit()
        onlooker.moved = time.monotonic()
        with onlooker.watching(site.run_dir):
            self.go_on(found, site, onlooker, faults)
            onlooker.held += site.settle()
        found.seconds = time.monotonic() - began
        self.finish(found, site, onlooker, straight)

    def go_on(self, found: Round, site: Site, onlooker: Onlooker, faults: Iterator[Fault]) -> None:
        """Hurt a run until Slurm says that it has ended well."""
        state, asked = "", time.monotonic()
        while True:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            self.follow(found, onlooker)
            site.repair()
            if now - onlooker.moved > STUCK_SECONDS:
                raise RuntimeError(
                    f"no step for {STUCK_SECONDS:.0f} s at step {onlooker.step} of {site.root}, job {site.job} {state}"
                )
            if now - asked >= ASK_SECONDS:
                fields = site.show()
                # Nodes are held while a job ends, too. A controller that is away learns late that one has ended.
                is_held = state in ("RUNNING", "COMPLETING") and (fields is not None or bool(site.processes()))
                onlooker.held += (now - asked) * is_held
                asked, state = now, fields["JobState"] if fields is not None else state
                if state == "COMPLETED" and is_finished(site.run_dir):
                    return
                if state in OVER:
                    self.submit_again(found, site, f"{state} {fields['ExitCode']}" if fields else state)
                elif fields is not None:
                    site.keep_going(fields)
            if state == "RUNNING" and self.is_due(onlooker):
                self.hurt(found, site, onlooker, next(faults))

    def is_due(self, onlooker: Onlooker) -> bool:
        """Whether the next fault may strike: its time has come, and the start has made steps."""
        since = time.monotonic() - max(self.began, self.struck)
        return since >= EVERY_SECONDS * bool(self.struck) and onlooker.is_moving() and self.time_left() > 0

    def hurt(self, found: Round, site: Site, onlooker: Onlooker, fault: Fault) -> None:
        """Let a fault strike."""
        self.struck = time.monotonic()
        made = Strike(fault.kind, "", self.struck - self.began, onlooker.step, onlooker.starts)
        found.strikes.append(made)
        made.hit = strike(fault, site)
        self.report(f"run {found.number}: {fault.kind} ({made.hit}) at step {made.step}, {made.seconds / 60:.1f} min")

    def follow(self, found: Round, onlooker: Onlooker) -> None:
        """Note what the newest fault cost: steps that were done again, and the longest time without one."""
        if not found.strikes:
            return
        made = found.strikes[-1]
        if onlooker.starts > made.starts and made.again is None:
            made.again = max(0, made.step - onlooker.began_at)
        recent = [self.struck, *(moment for moment, _ in onlooker.trail if moment > self.struck)]
        made.without = max((after - before for before, after in pairwise(recent)), default=None)

    def submit_again(self, found: Round, site: Site, how: str) -> None:
        """Do what an operator does with a job that has ended before its run, once its nodes are back."""
        site.finish_repairs()
        self.report(f"run {found.number}: job {site.job} ended, {how}; submitted again")
        if found.strikes:
            found.strikes[-1].submitted = how
        site.submit()

    def finish(self, found: Round, site: Site, onlooker: Onlooker, straight: Path) -> None:
        """Compare a run that has ended."""
        found.starts = onlooker.starts
        found.trail = [(moment - self.began, step) for moment, step in onlooker.trail]
        found.differences = compare(straight, site.run_dir, STEPS)
        if len(metrics(site.run_dir)) != STEPS:
            found.differences.append(f"{len(metrics(site.run_dir))} of {STEPS} steps are logged")
        found.left = site.leftovers()
        found.goodput, found.ended = compare_goodput(site, onlooker), True
        verdict = "; ".join(found.differences) or "bitwise equal"
        self.report(
            f"run {found.number}: {len(found.strikes)} faults, {found.starts} starts, {verdict}; left: {found.left}; {found.goodput}"
        )
