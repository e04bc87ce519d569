"""Verbs that compare whole runs: `amfm study ...`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amfm.launch.arguments import JsonOption, OverridesArgument
from amfm.launch.console import print_json, print_rows, say, show_progress
from amfm.launch.existing import require_exists
from amfm.pretrain.launcher_protocol import DONE, RUN_FAILED
from amfm.pretrain.packages import require_extra

if TYPE_CHECKING:
    from amfm_study.grid import Cell
    from amfm_study.run import CellEnd, Room
    from amfm_study.study import RunsConfig, Study, StudyConfig

StudyArgument = Annotated[
    Path, typer.Argument(metavar="STUDY.yaml", help="Study file (examples/study/README.md).", callback=require_exists)
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="List the runs and their progress, without training.")]

QUEUED_AT_ONCE = 100  # runs that a cluster is given

study = typer.Typer(
    epilog="Example: amfm study mixers configs/studies/hybrid_ratio_1m.yaml",
    no_args_is_help=True,
)


@study.command(epilog="Example: amfm study mixers configs/studies/hybrid_ratio_1m.yaml seeds=[0] --dry-run")
def mixers(
    path: StudyArgument,
    overrides: OverridesArgument = None,
    *,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the unfinished runs of a grid of mixer x share of attention, and write a table and plots."""
    from amfm_study.grid import expand_grid
    from amfm_study.study import load_study

    plan = load_study(path, overrides or [])
    cells = expand_grid(plan)
    if dry_run:
        print_cells(cells, plan.config.state_tokens, as_json=as_json)
        return
    run_study(plan, cells, lambda slots: write_results(plan, cells, slots), as_json=as_json)


@study.command(epilog="Example: amfm study settings configs/studies/muon_ladder_20m.yaml --dry-run")
def settings(
    path: StudyArgument,
    overrides: OverridesArgument = None,
    *,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model with several or crossed sets of overrides, such as rates and widths, and write one table."""
    from amfm_study.settings_run import print_settings, run_settings
    from amfm_study.study import load_settings_study

    plan = load_settings_study(path, overrides or [])
    if dry_run:
        print_settings(plan, as_json=as_json)
    else:
        require_extra("report", "amfm study")
        run_settings(plan, as_json=as_json)


@study.command(epilog="Example: amfm study mixture configs/studies/mixture_three_sources.yaml --dry-run")
def mixture(
    path: StudyArgument,
    overrides: OverridesArgument = None,
    *,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find weights for the data sources of a run: train sampled mixtures, fit a law, and test the proposed weights."""
    from amfm.launch.arguments import choose_device
    from amfm_study.mixture.cells import open_search, sampled_cells, weights_of
    from amfm_study.mixture.config import load_mixture_study
    from amfm_study.mixture.find import find_mixture
    from amfm_study.mixture.losses import measure_losses
    from amfm_study.mixture.plot import draw_mixture
    from amfm_study.mixture.result import Tried, mixture_json, mixture_markdown
    from amfm_study.table import read_result

    plan = load_mixture_study(path, overrides or [])
    search = open_search(plan)
    cells = sampled_cells(plan, search)
    if dry_run:
        shares = [
            {name: round(float(share), 3) for name, share in zip(search.sources, row)} for row in weights_of(cells)
        ]
        rows = [{"run": cell.name, **row, "done": read_result(cell) is not None} for cell, row in zip(cells, shares)]
        print_table(rows, as_json=as_json)
        return
    device = choose_device("auto")

    def measure(chosen: Sequence[Cell]) -> Tried:
        train_all(plan, chosen)
        with show_progress("evaluating") as progress:
            losses = measure_losses(chosen, search, plan.config.evaluation_tokens, device=device, progress=progress)
        return Tried.of(chosen, losses, search)

    found = find_mixture(plan, search, cells, measure)
    summary = mixture_json(found)
    texts = {"study.json": json.dumps(summary, indent=2) + "\n", "study.md": mixture_markdown(found)}
    replace_files(Path(plan.config.dir), texts)
    draw_mixture(found, Path(plan.config.dir, "study.png"))
    if as_json:
        print_json(summary)
    else:
        print(texts["study.md"], end="")


def train_all(
    plan: Study[RunsConfig], cells: Sequence[Cell], is_done: Callable[[Cell], bool] = lambda cell: False
) -> None:
    """Train those of the cells that are not done; exits with RUN_FAILED where one failed, with DONE where a signal came."""
    from amfm_study.table import read_result

    missing = [cell for cell in cells if not is_done(cell) and read_result(cell) is None]
    if not missing:
        return
    failures, went_through = run_missing(plan, cells, missing, room_of(plan.config))
    for name, end in failures.items():
        say(f"amfm study: run {name} failed: {end.cause}")
    if failures or not went_through:
        say("amfm study: what follows needs all of these runs; the same command continues")
        raise typer.Exit(RUN_FAILED if failures else DONE)


def room_of(config: RunsConfig) -> Room:
    """What there is for the runs of a study: of this machine, or as many as a cluster is asked for at once."""
    import torch

    from amfm.data_pipeline.prepare.ray_actors import choose_token

    choose_token(config.ray_address if config.on == "ray" else None)  # before Ray is imported
    from amfm_study.run import Room, find_room

    if config.on != "local":
        return Room(config.runs_at_once or QUEUED_AT_ONCE, config.threads_per_run, gpus=False)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return find_room(config.threads_per_run, config.runs_at_once, gpus)


def run_study(
    plan: Study[RunsConfig], cells: Sequence[Cell], write: Callable[[int], dict[str, Any]], *, as_json: bool
) -> None:
    """Run what is missing, `write` the results given the runs at once, show them, and exit as the runs ended."""
    require_extra("report", "amfm study")
    from amfm_study.table import read_result

    room = room_of(plan.config)
    missing = [cell for cell in cells if read_result(cell) is None]
    failures, went_through = run_missing(plan, cells, missing, room) if missing else ({}, True)
    summary = write(room.slots)
    if as_json:
        print_json({**summary, "failed": {name: end.cause for name, end in failures.items()}})
    else:
        print(Path(plan.config.dir, "study.md").read_text(encoding="utf-8"), end="")
    for name, end in failures.items():
        say(f"amfm study: run {name} failed: {end.cause}")
    if not went_through:
        say("amfm study: stopped by a signal; the same command continues")
    raise typer.Exit(RUN_FAILED if failures else DONE)


def run_missing(
    plan: Study[RunsConfig], cells: Sequence[Cell], missing: Sequence[Cell], room: Room
) -> tuple[dict[str, CellEnd], bool]:
    """Run unfinished cells under a live view.

    Returns how failed cells ended, by name, and False if a signal cut the study short. Raises ValueError before
    anything starts when a task's text is not prepared.
    """
    from amfm.data_pipeline.store.store import TokenStore
    from amfm_study.run import run_cells
    from amfm_study.show import StudyDisplay
    from amfm_study.table import read_result

    for data in {
        cell.config.data.store: cell.config.data for cell in missing if cell.config.data.synthetic is None
    }.values():
        TokenStore.open(data.text_store())
    waiting = {cell.name for cell in missing}
    done = [result for cell in cells if cell.name not in waiting and (result := read_result(cell)) is not None]
    display = StudyDisplay(cells, done)
    failures: dict[str, CellEnd] = {}

    def hear_end(cell: Cell, end: CellEnd) -> None:
        display.end(cell, end, read_result(cell))
        if end.cause:
            failures[cell.name] = end

    try:
        whole = run_cells(
            missing,
            Path(plan.config.dir),
            room,
            begins=display.begin,
            ends=hear_end,
            polls=display.poll,
            on=plan.config.on,
            ray_address=plan.config.ray_address,
        )
    finally:
        display.close()
    return failures, whole


def write_results(plan: Study[StudyConfig], cells: Sequence[Cell], slots: int) -> dict[str, Any]:
    """Write study.json, study.md and study.png of the finished runs; returns what study.json holds.

    Each file replaces the last one in a rename, so a reader never sees half of one.
    """
    from amfm_study.plots import draw_study
    from amfm_study.table import make_rows, measure_of, read_result, study_json, study_markdown

    folder, tokens = Path(plan.config.dir), plan.config.state_tokens
    results = [result for cell in cells if (result := read_result(cell)) is not None]
    rows = make_rows(cells, results, tokens)
    summary = study_json(cells, results, rows, state_tokens=tokens, slots=slots)
    texts = {
        "study.json": json.dumps(summary, indent=2) + "\n",
        "study.md": study_markdown(cells, results, rows, state_tokens=tokens, slots=slots),
    }
    replace_files(folder, texts)
    if rows:
        measures = {cell.task: measure_of(cell.config) for cell in cells}
        draw_study(rows, measures, tokens, folder / "study.png")
    return summary


def replace_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files of a folder, each instead of the last one in a rename."""
    from amfm.data_pipeline.durable.files import write_file_atomically

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_file_atomically(folder / name, text.encode())


def print_cells(cells: Sequence[Cell], state_tokens: int, *, as_json: bool) -> None:
    """Print the grid before it runs."""
    from amfm.model.flops import count_parameters
    from amfm.pretrain.stages import total_steps
    from amfm_study.table import count_state, read_result, show_ratio

    rows = [
        {
            "run": cell.name,
            "pattern": cell.config.model.pattern,
            "parameters": count_parameters(cell.config.model).total,
            "state_bytes": count_state(cell.config, state_tokens),
            "ratio": show_ratio(cell.ratio),
            "steps": total_steps(cell.config),
            "done": read_result(cell) is not None,
        }
        for cell in cells
    ]
    print_table(rows, as_json=as_json)


def print_table(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Rows of cells, as a table or as JSON."""
    if as_json:
        print_json(list(rows))
    else:
        print_rows(f"{len(rows)} runs", list(rows[0]), [list(row.values()) for row in rows])
