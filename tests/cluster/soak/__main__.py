"""`python -m tests.cluster.soak`: runs on four nodes of real Slurm, a fault every two minutes, compared with an undisturbed run."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amfm.launch.arguments import JsonOption, check_picture
from amfm.launch.console import print_json, print_rows, say
from benchmarks.command import main
from tests.cluster.soak.pause import install_pause

if TYPE_CHECKING:
    from tests.cluster.soak.soak import Round

GOODPUT_DIFFERENCE = 0.02


def soak(
    *,
    seed: Annotated[int, typer.Option(min=0, help="The faults, their order and what they hit.")],
    minutes: Annotated[
        float, typer.Option(min=0.1, help="How long faults strike; the last run then ends in peace.")
    ] = 60,
    folder: Annotated[
        Path | None, typer.Option(help="A new folder with a short path for all that is made; none: a temporary one.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw steps over time with the faults: .png, .svg or .pdf.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Hurt runs on four nodes of real Slurm, and compare each with an undisturbed one bitwise, and its goodput with a clock.

    Ends with 3 where losses differ, something is left, a run stands still, or goodput is off by more than 2%. Needs what
    `make test-cluster` needs.
    """
    if picture is not None:
        check_picture(picture)
    place = (folder or Path(tempfile.mkdtemp(prefix="k.", dir="/tmp"))).resolve()
    place.mkdir(parents=True, exist_ok=True)
    install_pause(place / "packages")
    from tests.cluster.soak.faults import KINDS
    from tests.cluster.soak.site import STEPS
    from tests.cluster.soak.soak import Soak

    say(f"seed {seed}, in {place}")
    work, failure = Soak(place, seed, 60 * minutes, say), ""
    try:
        work.run()
    except RuntimeError as error:
        failure = str(error)
    failure = failure or find_failure(work.rounds)
    result = summarize(work.rounds, seed, failure)
    if as_json:
        print_json(result)
    else:
        print_soak(work.rounds, result)
    if picture is not None:
        from tests.soak.picture import draw_soak

        draw_soak(work.rounds, f"Soak on Slurm, seed {seed}: {result['verdict']}", picture, KINDS, STEPS)
    if failure:
        raise RuntimeError(f"{failure}; all is in {place}")
    if folder is None:
        shutil.rmtree(place)


def find_failure(rounds: list[Round]) -> str:
    """The first thing that is not as it must be; empty for none."""
    for found in rounds:
        wrong = [*found.differences, *(f"{what} is left" for what in found.left)]
        goodput = found.goodput
        if goodput and abs(goodput.share / goodput.seen_share - 1) > GOODPUT_DIFFERENCE:
            wrong.append(f"goodput {goodput.share:.1%}, {goodput.seen_share:.1%} by the clock")
        if wrong:
            return f"run {found.number}: {wrong[0]}"
    return ""


def summarize(rounds: list[Round], seed: int, failure: str) -> dict[str, Any]:
    """Sum up the runs as JSON values."""
    strikes = sum(len(found.strikes) for found in rounds)
    minutes = sum(found.seconds for found in rounds) / 60
    facts = f"{sum(found.ended for found in rounds)} runs, {minutes:.0f} minutes, {strikes} faults"
    return {
        "seed": seed,
        "verdict": f"{facts}; FAILED: {failure}" if failure else f"{facts}, bitwise equal",
        "minutes": minutes,
        "num_faults": strikes,
        "submitted_again": sum(bool(struck.submitted) for found in rounds for struck in found.strikes),
        "rounds": [asdict(found) for found in rounds],
    }


def print_soak(rounds: list[Round], result: dict[str, Any]) -> None:
    """Print a line for each fault and each run, and the verdict."""
    rows = [
        (
            found.number,
            f"{struck.seconds / 60:.1f}",
            struck.kind,
            struck.hit,
            struck.step,
            "-" if struck.again is None else struck.again,
            "-" if struck.without is None else f"{struck.without:.0f}",
            struck.submitted or "-",
        )
        for found in rounds
        for struck in found.strikes
    ]
    head = ("run", "minute", "fault", "hit", "step", "steps again", "no step for, s", "submitted again after")
    print_rows(f"Faults of seed {result['seed']}", head, rows)
    ends = [
        (
            found.number,
            len(found.strikes),
            found.starts,
            f"{found.seconds / 60:.1f}",
            *describe_goodput(found),
            ", ".join(found.left) or "nothing",
            (found.differences or ["bitwise equal"])[0] if found.ended else "not ended",
        )
        for found in rounds
    ]
    head = (
        "run",
        "faults",
        "starts",
        "minutes",
        "goodput, %",
        "by the clock, %",
        "at pace, %",
        "held, s",
        "by the clock, s",
    )
    print_rows("Runs", (*head, "left", "end"), ends)
    say(result["verdict"])


def describe_goodput(found: Round) -> list[str]:
    """Goodput of a run and of the onlooker, as cells."""
    made = found.goodput
    if made is None:
        return ["-"] * 5
    shares = [f"{100 * share:.1f}" for share in (made.share, made.seen_share, made.at_pace)]
    return [*shares, f"{made.held:.0f}", f"{made.seen_held:.0f}"]


if __name__ == "__main__":
    main(soak, "tests")
