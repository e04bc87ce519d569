"""Restarts a run after each failure until it is done, or until another attempt makes no sense.

How it works: a launcher (torchrun, Slurm, Ray) brings a function that starts all ranks once and reports how that ended.
An exit code decides what follows: done and bad input end the run, a failure starts it again from its newest checkpoint,
after waiting for lost nodes and, if they stay away, on as many as can share the batch.

Why it stops: a restart repairs what the machine did (a lost node, a hung rank), not what the run does. Two failures with
no newer checkpoint between them would be followed by a third, so that counts as a fault of the run, and the first cause
is what the user is told. Nothing but checkpoints carries state from one attempt to the next, so any attempt may be
killed at any moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.console import say
from pretrain.checks.check_run import check_run
from pretrain.config.errors import ConfigError
from pretrain.config.schema import RunConfig
from pretrain.launcher_protocol import BAD_INPUT, DONE, RUN_FAILED

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
    """How an attempt ended: exit code as of one `amfm train`, and for a failure the rank, host and last words."""

    code: int
    cause: str = ""


def supervise(
    config: RunConfig,
    start: Callable[[Attempt], Outcome],
    *,
    nodes: int,
    ranks_per_node: int,
    usable_nodes: Callable[[], int],
) -> int:
    """Start the run on `nodes` nodes, start it again after each failure, and return the exit code.

    `start` runs one attempt to its end. `usable_nodes` says how many there are now; lost ones get
    `launch.node_wait_seconds` to come back. On fewer nodes than wanted the run goes on with the most that can share
    its batch. Stops with the first cause when `launch.max_restarts` are used up, when the input is refused (code 2), and
    when failures follow each other without a newer checkpoint between them.
    """
    cause: str | None = None
    causes: list[str] = []
    stuck = 0
    for number in range(config.launch.max_restarts + 1):
        usable = wait_for_nodes(config, nodes, usable_nodes) if number else nodes
        attempt = Attempt(number, fitting_nodes(config, usable, ranks_per_node), cause)
        if attempt.nodes < nodes:
            say(f"amfm launch: going on with {attempt.nodes} of {nodes} nodes")
        before = newest_step(config)
        outcome = start(attempt)
        if outcome.code in (DONE, BAD_INPUT):
            return outcome.code
        cause = outcome.cause or f"exit code {outcome.code}"
        causes.append(cause)
        stuck = 0 if newest_step(config) > before else stuck + 1
        say(f"amfm launch: attempt {number} failed at checkpoint step {newest_step(config)}: {cause}")
        if stuck >= STUCK_ATTEMPTS:
            say(
                f"amfm launch: {stuck} attempts in a row came to no newer checkpoint; not starting again. The first "
                f"failed because: {causes[-stuck]}"
            )
            return RUN_FAILED
    say(f"amfm launch: launch.max_restarts={config.launch.max_restarts} are used up. First cause: {causes[0]}")
    return RUN_FAILED


def wait_for_nodes(config: RunConfig, wanted: int, usable_nodes: Callable[[], int]) -> int:
    """Number of usable nodes, `wanted` at most, after waiting up to `launch.node_wait_seconds` for lost ones."""
    deadline = time.monotonic() + config.launch.node_wait_seconds
    while (usable := usable_nodes()) < wanted and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return min(wanted, usable)


def start_once(start: Callable[[Attempt], Outcome], nodes: int) -> int:
    """Run a command that is no training run in one attempt; print the cause of failure, return the exit code."""
    outcome = start(Attempt(0, nodes, None))
    if outcome.cause:
        say(f"amfm launch: {outcome.cause}")
    return outcome.code


def newest_step(config: RunConfig) -> int:
    """Step of the newest complete checkpoint by its name, -1 without one."""
    from pretrain.checkpoint.commit import list_checkpoints

    directory = Path(config.run.dir) / "checkpoints"
    return max((int(path.name.split("-")[1].split(".")[0]) for path in list_checkpoints(directory)), default=-1)


def fitting_nodes(config: RunConfig, usable: int, ranks_per_node: int) -> int:
    """The largest number of nodes, at most `usable`, whose ranks can run the configuration.

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
            check_run(config, nodes * ranks_per_node)
        except ConfigError as error:
            reason = reason or error
        else:
            return nodes
    raise RuntimeError(f"no number of nodes from {smallest} to {usable} fits the run: {reason}")
