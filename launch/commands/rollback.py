"""The verbs that go back to an earlier step of a run: rollback, and fork, which leaves the run as it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amfm.data_pipeline.memory import no_garbage_collection
from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import JsonOption, OverridesArgument
from amfm.launch.console import print_json, print_pairs, print_rows
from amfm.launch.existing import require_exists

if TYPE_CHECKING:
    from amfm.pretrain.checkpoint.remote import RemoteCheckpoints
    from amfm.pretrain.rollback import Rollback


def require_run(path: Path) -> Path:
    """Typer callback of a run directory that must exist."""
    if not (require_exists(path) / "config.yaml").is_file():
        raise FileNotFoundError(f"{path} holds no config.yaml, so it is not a run directory; give run.dir of a run")
    return path


def rollback(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run directory.", callback=require_run)],
    *,
    to: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Make the checkpoint of step N the newest one.")
    ] = None,
    undo: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Take rollback K back: continue where it left off.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `rollback`.

    The same `amfm train` then continues from step N, whose checkpoint is kept for good. Without --to and --undo, lists
    the steps and what is set aside.
    """
    if to is not None and undo is not None:
        raise ValueError(f"--to {to} goes back and --undo {undo} forward; give one of them")
    with Waiting("amfm rollback") as waiting, no_garbage_collection():
        waiting("looking at the checkpoints")
        from amfm.pretrain.checkpoint.remote import RemoteCheckpoints
        from amfm.pretrain.config.file import load_config
        from amfm.pretrain.monitor.ownership import lock_directory
        from amfm.pretrain.rollback import roll_back, roll_forward

        store = load_config(run_dir / "config.yaml").train.checkpoint_store
        remote = None if store is None else RemoteCheckpoints(store)
        made: Rollback | None = None
        if to is not None or undo is not None:
            with lock_directory(run_dir):
                if to is not None:
                    made = roll_back(run_dir, to, remote, by="amfm rollback")
                elif undo is not None:
                    made = roll_forward(run_dir, undo, remote)
        steps, rollbacks = list_steps(run_dir, remote)
    if as_json:
        print_json({"steps": steps, "rollbacks": rollbacks})
        return
    if made is not None:
        print_made(run_dir, made, steps[-1]["step"] if steps else None)
    print_rows(
        f"Checkpoints of {run_dir}",
        ("step", "run directory", "store", "kept for good"),
        [(row["step"], *("yes" if row[name] else "-" for name in ("here", "store", "kept"))) for row in steps],
    )
    if rollbacks:
        rows = [
            (row["number"], row["step"], ", ".join(map(str, row["steps"])) or "-", row["time"]) for row in rollbacks
        ]
        print_rows("Set aside", ("rollback", "to step", "steps", "at"), rows)


def fork(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.", callback=require_run)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Run directory of the branch; must be missing or empty.")],
    overrides: OverridesArgument = None,
    *,
    step: Annotated[int, typer.Option(min=1, metavar="N", help="Continue from the checkpoint of this step.")],
    as_json: JsonOption = False,
) -> None:
    """Branch off a run: OUT continues from a checkpoint with other settings, such as an annealing stage; RUN stays.

    What a resume refuses to change is rejected here too. `amfm train OUT/config.yaml` then continues.
    """
    with Waiting("amfm fork") as waiting, no_garbage_collection():
        from amfm.pretrain.checks.check_run import check_run
        from amfm.pretrain.config.file import load_config
        from amfm.pretrain.rollback import fork_run

        # Its own name, or the curves of both would be one at Weights & Biases.
        own = ["run.name=null", "train.resume_step=null", *(overrides or []), f"run.dir={json.dumps(str(out))}"]
        config = load_config(run_dir / "config.yaml", own)
        check_run(config, steps_done=step)
        made = fork_run(run_dir, step, config, waiting)
    if as_json:
        print_json({"path": str(made.path), "step": made.step, "changes": list(made.changes)})
        return
    changes = [("changed", change) for change in made.changes if not change.startswith("run.")]
    command = f"amfm train {made.path}/config.yaml"
    print_pairs(f"{made.path} continues from step {step} of {run_dir}", [*changes, ("to train it", command)])


def print_made(run_dir: Path, made: Rollback, newest: int | None) -> None:
    """Print what was done, and the command that takes it back."""
    where = run_dir / "checkpoints" / made.folder
    print_pairs(
        f"{run_dir} continues from step {newest}",
        [
            ("set aside", ", ".join(map(str, made.steps)) or "no checkpoint"),
            ("in", where),
            ("to take it back", f"amfm rollback {run_dir} --undo {made.number}"),
        ],
    )


def list_steps(run_dir: Path, remote: RemoteCheckpoints | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The checkpoints of a run, oldest first, and its rollbacks, as JSON values."""
    from amfm.pretrain.checkpoint.commit import is_marked
    from amfm.pretrain.checkpoint.manifest_file import MARK_NAME, list_checkpoints, step_of
    from amfm.pretrain.checkpoint.remote import step_named
    from amfm.pretrain.rollback import list_rollbacks

    here = {step_of(path): path for path in list_checkpoints(run_dir / "checkpoints")}
    there = {} if remote is None else {step_named(name): objects for name, objects in remote.list_whole().items()}
    steps = [
        {
            "step": step,
            "here": step in here,
            "store": step in there,
            "kept": (step in here and is_marked(here[step])) or MARK_NAME in there.get(step, []),
        }
        for step in sorted({*here, *there})
    ]
    return steps, [asdict(each) for each in list_rollbacks(run_dir, remote)]


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm fork runs/my runs/annealed train.steps=22000 --step 20000")(fork)
    app.command(epilog="Example: amfm rollback runs/my --to 20000; amfm rollback runs/my --undo 1")(rollback)
