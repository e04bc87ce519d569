"""The verb replay, and what `amfm inspect --spike` does and prints: steps of a run that are looked at afterwards."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amfm.data_pipeline.memory import no_garbage_collection
from amfm.data_pipeline.terminal import Waiting, printable
from amfm.launch.arguments import JsonOption
from amfm.launch.commands.rollback import require_run
from amfm.launch.console import print_json, print_pairs, print_rows
from amfm.pretrain.launcher_protocol import RUN_FAILED

if TYPE_CHECKING:
    from amfm_replay.replay import Outcome, Replay


def replay(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.", callback=require_run)],
    *,
    step: Annotated[int, typer.Option(min=1, metavar="N", help="Compute the run up to the end of this step.")],
    ranks: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Ranks on this machine; default: as many as the run had.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Keep the run directory of the replay; default: removed.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `replay`.

    Starts from the newest checkpoint before step N, or from the beginning, with the configurations of then; the run stays as it is. Exit code 3:
    something differs, and the first rank, tensor or number is named.

    Example: amfm replay runs/my --step 21500
    """
    place = out or run_dir.resolve().with_name(f".{run_dir.resolve().name}.replay")
    if out is None:
        shutil.rmtree(place, ignore_errors=True)  # of a replay that was killed
    try:
        with Waiting("amfm replay") as waiting, no_garbage_collection():
            from amfm_replay.replay import compare_replay, prepare_replay

            prepared = prepare_replay(run_dir, step, place, num_ranks=ranks, report=waiting)
        for leg in prepared.legs:
            leg.write(place / "config.yaml")
            arguments = ["train", str(place / "config.yaml"), "--nproc", str(leg.world_size), "--force"]
            if code := context.obj(arguments):
                raise typer.Exit(code)
        with Waiting("amfm replay") as waiting:
            outcome = compare_replay(run_dir, prepared, waiting)
    finally:
        if out is None:
            shutil.rmtree(place, ignore_errors=True)
    if as_json:
        facts = {name: getattr(prepared, name) for name in ("first", "last", "remarks")}
        legs = [{"last": leg.last, "world_size": leg.world_size} for leg in prepared.legs]
        equal = {"path": out and str(out), "equal": outcome.difference is None}
        print_json(facts | {"legs": legs} | asdict(outcome) | equal)
    else:
        print_outcome(run_dir, prepared, outcome)
    if outcome.difference is not None:
        raise typer.Exit(RUN_FAILED)


def print_outcome(run_dir: Path, prepared: Replay, outcome: Outcome) -> None:
    """Print what was compared and the first difference."""
    first = outcome.difference
    verdict = "bitwise equal"
    if first is not None:
        place = "" if first.rank is None else f", written by rank {first.rank}, its number {first.index}"
        verdict = f"{first.name} of step {first.step}{place}: {first.recorded} in the run, {first.computed} here"
    found = f"{outcome.tensors} tensors differ" if outcome.tensors else "equal"
    print_pairs(
        f"Steps {prepared.first} to {prepared.last} of {run_dir}, computed again",
        [
            ("result" if first is None else "first difference", verdict),
            ("loss", outcome.loss),
            ("gradient norm", outcome.grad_norm),
            ("weights", f"SHA-256 {outcome.weights_sha256}"),
            ("checkpoint", found if outcome.has_checkpoint else f"the run has none of step {prepared.last}"),
            *(("not as then", remark) for remark in prepared.remarks),
        ],
    )


def show_spike(run_dir: Path, step: int, *, as_json: bool) -> None:
    """Measure the sequences of a step with weights from before it, and print the worst documents with their places."""
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"--spike {step} of {run_dir} needs a run directory")
    with Waiting("amfm inspect") as waiting:
        from amfm.launch.arguments import choose_device
        from amfm_replay.spike import find_worst

        found = find_worst(run_dir, step, device=choose_device("auto"), report=waiting)
    if as_json:
        print_json(asdict(found))
        return
    rows = [(sample, source, f"{loss:.3f}") for sample, source, loss in found.rows[:10]]
    title = f"Rows of step {step}, by the weights of step {found.weights_of_step}"
    print_rows(title, ("sample", "source", "loss"), rows)
    for each in found.documents:
        place = (
            f"{each.source}, {each.part}, document {each.document}, token {each.first_token:,}, sample {each.sample}"
        )
        print(f"--- loss {each.loss:.3f} over {each.tokens:,} tokens: {place}\n{printable(each.text)}")
