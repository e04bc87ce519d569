"""`python -m tests.soak`: a small run under random faults, compared with the same run undisturbed."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amfm.launch.arguments import JsonOption, check_picture
from amfm.launch.console import print_json, print_rows, say
from benchmarks.command import main

if TYPE_CHECKING:
    from tests.soak.soak import Round, Strike

MINUTES = 3.0


def soak(
    *,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="How long faults strike, by default 3; the last round then goes to its end."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Replays the faults of that seed; none: a new one.")] = None,
    only_round: Annotated[
        int | None, typer.Option("--round", min=0, help="Do only this round of the seed, hurt to its last step.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="A new folder for runs and logs, kept; none: a temporary one, kept on failure.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw steps over time and the faults on them: .png, .svg or .pdf.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Kill, stop, hang and damage a small run on 2 to 4 ranks, and compare its losses with an undisturbed one, bitwise.

    Ends with 3 when a round's losses differ, or a start does not end as its fault says. Needs Linux, a C compiler, two cores.
    """
    check_options(minutes, seed, only_round, folder, picture)
    from amfm.launch.cluster.local import forward_signals
    from amfm.pretrain.monitor.environment import read_processor_name
    from tests.soak.disk import build_library
    from tests.soak.soak import Soak

    build_library()
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    place = folder or Path(tempfile.mkdtemp(prefix="amfm-soak-"))
    seconds = float("inf") if only_round is not None else 60 * (minutes or MINUTES)
    say(f"seed {seed}, in {place}")
    work, failure = Soak(place.resolve(), seed, seconds, say), ""
    try:
        with forward_signals(interrupt, (signal.SIGTERM,)):
            work.run(only_round)
    except RuntimeError as error:
        failure = str(error)
    failure = failure or describe_difference(work.rounds)
    result = summarize(work.rounds, seed, failure) | {"processor": read_processor_name(), "folder": str(place)}
    if as_json:
        print_json(result)
    else:
        print_soak(work.rounds, result)
    if picture is not None:
        from tests.soak.picture import draw_soak

        draw_soak(work.rounds, f"Soak, seed {seed}: {result['verdict']}", picture)
    if failure:
        again = f"python -m tests.soak --seed {seed} --round {work.rounds[-1].number} does the round again; " * bool(
            work.rounds
        )
        raise RuntimeError(f"{failure}; {again}the runs are in {place}")
    if folder is None:
        shutil.rmtree(place)


def check_options(
    minutes: float | None, seed: int | None, only_round: int | None, folder: Path | None, picture: Path | None
) -> None:
    """Reject what cannot take effect. Raises ValueError."""
    if only_round is not None and seed is None:
        raise ValueError(f"--round {only_round} is a round of a seed; name it: --seed N")
    if only_round is not None and minutes is not None:
        raise ValueError(f"--round {only_round} is hurt to its last step, however long that takes; leave --minutes out")
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--folder {folder} must be new or empty; name another one")
    if picture is not None:
        check_picture(picture)


def interrupt(number: int) -> None:
    """End as Ctrl-C does, on the way out of which every process of the soak is killed."""
    raise KeyboardInterrupt


def describe_difference(rounds: list[Round]) -> str:
    """Describe the first round that did not end as the undisturbed run; empty for none."""
    bad = next((found for found in rounds if found.differences), None)
    return f"round {bad.number} ({bad.layout}) did not end as undisturbed: {bad.differences[0]}" if bad else ""


def summarize(rounds: list[Round], seed: int, failure: str) -> dict[str, Any]:
    """Sum up rounds as JSON values."""
    from amfm.pretrain.monitor.panel import plural

    strikes = [struck for found in rounds for struck in found.strikes]
    counts = Counter(struck.kind for struck in strikes)
    ended = sum(found.ended for found in rounds)
    return {
        "seed": seed,
        "equal": not failure,
        "verdict": f"FAILED: {failure}"
        if failure
        else f"{plural(ended, 'round')}, {plural(len(strikes), 'fault')}, bitwise equal",
        "seconds": sum(found.seconds for found in rounds),
        "starts": sum(found.starts for found in rounds),
        "faults": {kind: describe_kind(kind, strikes) for kind, _ in counts.most_common()},
        "num_faults": len(strikes),
        "rounds": [asdict(found) for found in rounds],
    }


def describe_kind(kind: str, strikes: list[Strike]) -> dict[str, Any]:
    """Sum up the strikes of one kind: how many, the launchers' exit codes, and the most steps that were done again."""
    own = [struck for struck in strikes if struck.kind == kind]
    codes = Counter(struck.code for struck in own if struck.code is not None)
    again = [max(0, struck.step - struck.resumed_at) for struck in own if struck.resumed_at is not None]
    return {
        "count": len(own),
        "exit_codes": {str(code): count for code, count in sorted(codes.items())},
        "most_steps_again": max(again, default=None),
    }


def print_soak(rounds: list[Round], result: dict[str, Any]) -> None:
    """Print the faults by kind, a line a round, and the verdict."""
    kinds = [
        (
            kind,
            facts["count"],
            ", ".join(f"{code} ({count})" for code, count in facts["exit_codes"].items()) or "continued",
            "" if facts["most_steps_again"] is None else facts["most_steps_again"],
        )
        for kind, facts in result["faults"].items()
    ]
    rows = [
        (
            found.number,
            found.layout,
            len(found.strikes),
            found.starts,
            f"{found.seconds / 60:.1f}",
            found.differences[0] if found.differences else "bitwise equal" if found.ended else "went wrong",
        )
        for found in rounds
    ]
    print_rows("Faults", ("fault", "strikes", "launcher ended with", "most steps done again"), kinds)
    print_rows(f"Rounds of seed {result['seed']}", ("round", "layout", "faults", "starts", "minutes", "end"), rows)
    say(result["verdict"])


if __name__ == "__main__":
    main(soak, "tests")
