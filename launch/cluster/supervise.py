"""Restarts a run after each failure until it is done, or until another attempt makes no sense.

How it works: a launcher (torchrun, Slurm, Ray) brings a function that starts all ranks once and reports how that ended.
An exit code decides what follows: done and bad input end the run, a failure starts it again from its newest checkpoint,
after waiting for lost nodes and, if they stay away, on as many as can share the batch. A stage with its own layout
is another start too, on as many nodes as that layout can use.

Why it stops: a restart repairs what the machine did (a lost node, a hung rank), not what the run does. So starts after
an attempt that brought a newer checkpoint are free, and `launch.max_restarts` counts the others. Two failures with
no newer checkpoint between them would be followed by a third, so that counts as a fault of the run, and the first cause
is what the user is told. Nothing but checkpoints carries state from one attempt to the next, so any attempt may be
killed at any moment.

Ctrl-C at a launcher whose ranks a keyboard does not reach: the first one lets them save and end, as SIGTERM does.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from amfm.launch.cluster.local import FORWARDED, forward_signals
from amfm.launch.cluster.storage import StorageWait
from amfm.launch.console import say
from amfm.pretrain.checkpoint.manifest_file import continued_step, newest_saved_step
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, INTERRUPTED, RUN_FAILED, VANISHED, has_vanished
from amfm.pretrain.stages import RunStage, fresh_starts, resolve_stages, stage_of

POLL_SECONDS = 1.0
STUCK_ATTEMPTS = 2  # failures without a newer checkpoint between them: a third would fail like them


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks. `cause`: why the attempt before it ended, none for the first."""

    number: int
    nodes: int
    cause: str | None


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: exit code as of one `amfm train`, and for a failure the rank, host and last words.

    began: whether ranks were started at all. Nodes that were lost since they were counted are not the run's fault, and the
    run's events need not say why a launcher without time left started nothing.
    """

    code: int
    cause: str = ""
    began: bool = True


def supervise(
    config: RunConfig,
    start: Callable[[Attempt], Outcome],
    *,
    nodes: int,
    ranks_per_node: int,
    usable_nodes: Callable[[], int],
) -> int:
    """Start the run on `nodes` nodes, start it again after each failure and for each layout, and return the exit code.

    `start` runs one attempt to its end. `usable_nodes` says, before each, how many there are that can take ranks; lost ones get
    `launch.node_wait_seconds` to come back. On fewer nodes than wanted the run continues with the most that can share
    its batch. Stops with the first cause when `launch.max_restarts` are used up, when the input is rejected (code 2), when
    Ctrl-C came (130), and when failures follow each other without a newer checkpoint between them.
    """
    stages = resolve_stages(config)
    cause: str | None = None
    causes: list[str] = []
    stuck = wasted = number = 0
    storage = StorageWait(Path(config.run.dir), config.launch.storage_wait_seconds)
    while wasted <= config.launch.max_restarts:
        usable = storage.until(lambda: wait_for_nodes(config, nodes, usable_nodes))
        before = continued_step(config)
        attempt = Attempt(number, fitting_nodes(config, usable, ranks_per_node, steps_done=max(0, before)), cause)
        if attempt.nodes < nodes:
            say(f"amfm launch: continuing with {attempt.nodes} of {nodes} nodes")
        outcome = run_attempt(start, attempt, storage)
        if outcome.code in (DONE, BAD_INPUT, INTERRUPTED):
            return outcome.code
        if not outcome.began:
            say(f"amfm launch: {outcome.cause}; looking again, which counts as no attempt")
            continue
        after, number = storage.until(lambda: newest_saved_step(config.run.dir)), number + 1
        stuck = 0 if after > before else stuck + 1
        # Not only by the code: srun and torchrun have their own codes for ranks that end one after the other.
        if after > before and after in fresh_starts(config):
            if has_left_layout(stages, before, after):
                say(f"amfm launch: stage {stage_of(stages, after).name} begins at step {after}, in its own layout")
            else:
                say(f"amfm launch: after step {after} the factored matrices continue without guides")
            cause = None
            continue
        cause = outcome.cause or f"exit code {outcome.code}"
        causes.append(cause)
        wasted += not after > before
        say(f"amfm launch: attempt {attempt.number} failed at checkpoint step {after}: {cause}")
        if stuck >= STUCK_ATTEMPTS:
            say(
                f"amfm launch: {stuck} attempts in a row came to no newer checkpoint; not starting again. The first "
                f"failed because: {causes[-stuck]}"
            )
            return RUN_FAILED
    say(f"amfm launch: launch.max_restarts={config.launch.max_restarts} are used up. First cause: {causes[0]}")
    return RUN_FAILED


def run_attempt(start: Callable[[Attempt], Outcome], attempt: Attempt, storage: StorageWait) -> Outcome:
    """Run one attempt: a rejection of the storage, in a check that runs with it, is none; an end without a word is a failure."""
    try:
        outcome = start(attempt)
    except OSError as error:
        storage.refuse(error)
        return Outcome(RUN_FAILED, f"the storage rejected: {error.strerror}", began=False)
    storage.deadline = None
    if outcome.code == DONE and outcome.began and has_vanished(storage.run_dir):
        return Outcome(RUN_FAILED, VANISHED)
    return outcome


def has_left_layout(stages: tuple[RunStage, ...], before: int, after: int) -> bool:
    """Whether the checkpoint of step `after` ends a stage behind which another layout begins; `before`: of the start."""
    present, coming = stage_of(stages, max(0, before)), stage_of(stages, after)
    return coming.first_step == after and coming.config.parallel != present.config.parallel


def wait_for_nodes(config: RunConfig, wanted: int, usable_nodes: Callable[[], int]) -> int:
    """Number of usable nodes, `wanted` at most, after waiting up to `launch.node_wait_seconds` for lost ones."""
    deadline = time.monotonic() + config.launch.node_wait_seconds
    while (usable := usable_nodes()) < wanted and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return min(wanted, usable)


def start_once(start: Callable[[Attempt], Outcome], nodes: int) -> int:
    """Run a command that is not a training run in one attempt; print the cause of failure, return the exit code."""
    outcome = start(Attempt(0, nodes, None))
    if outcome.cause:
        say(f"amfm launch: {outcome.cause}")
    return outcome.code


def fitting_nodes(config: RunConfig, usable: int, ranks_per_node: int, *, steps_done: int = 0) -> int:
    """The largest number of nodes, at most `usable`, whose ranks can run the stage after this many steps.

    Raises RuntimeError when there are fewer than `launch.min_nodes` or none fits, with the rule that the usable number
    breaks.
    """
    smallest = config.launch.min_nodes
    if usable < smallest:
        raise RuntimeError(
            f"{usable} node(s) can be used and launch.min_nodes={smallest}; bring nodes back, or lower launch.min_nodes"
        )
    reason: ConfigError | None = None
    for nodes in range(usable, smallest - 1, -1):
        try:
            check_run(config, nodes * ranks_per_node, steps_done=steps_done, goes_on=True)
        except ConfigError as error:
            reason = reason or error
        else:
            return nodes
    raise RuntimeError(f"no number of nodes from {smallest} to {usable} fits the run: {reason}")


class Interrupt:
    """Whether Ctrl-C came while an attempt ran, and what its outcome is then."""

    def __init__(self) -> None:
        self.came = False

    def translate(self, number: int) -> int:
        """The signal that ranks get for one that came here. Raises KeyboardInterrupt for the second Ctrl-C."""
        if number != signal.SIGINT:
            return number
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        say("amfm launch: interrupted; the ranks save and end (Ctrl-C again ends them immediately)")
        return signal.SIGTERM

    def outcome(self, ended: Outcome) -> Outcome:
        """The outcome of the attempt: after Ctrl-C no other one follows, however its ranks ended."""
        return Outcome(INTERRUPTED) if self.came else ended


@contextmanager
def forward_to_ranks(forward: Callable[[int], None]) -> Iterator[Interrupt]:
    """Inside the block, hand SIGTERM, SIGUSR1 and SIGHUP to `forward`, and the first Ctrl-C as SIGTERM."""
    interrupt = Interrupt()
    with forward_signals(lambda number: forward(interrupt.translate(number)), (*FORWARDED, signal.SIGINT)):
        yield interrupt
