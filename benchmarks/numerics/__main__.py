"""`python -m benchmarks.numerics`: a model trained by recipes of low precision, next to the same without."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption, OverridesArgument
from amfm.launch.console import print_json, print_rows, say
from amfm.pretrain.config.file import load_config
from amfm.pretrain.startup.arithmetic import resolve_precision
from benchmarks.command import main
from benchmarks.numerics.compare import RECIPES, WIDE, compare_recipes, find_excess, last_loss


def numerics(
    path: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration file.")],
    overrides: OverridesArgument = None,
    *,
    recipes: Annotated[str, typer.Option(help="Recipes to compare, separated by commas.")] = "fp8_block,mxfp8,nvfp4",
    steps: Annotated[int, typer.Option(min=1, help="Steps per run; the schedule is that of the configuration.")] = 100,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds; each trains one run without a recipe and one per recipe.")
    ] = 1,
    limit: Annotated[
        float | None,
        typer.Option(help="Exit with 3 if a recipe's loss is higher than without by more than this, such as 0.003."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model with and without each low-precision recipe on the same data, and compare losses and gradients.

    One rank, the first training stage; recipes that this machine's GPU lacks are emulated.
    """
    names = [name for name in RECIPES if name in recipes.split(",")]
    unknown = [word for word in recipes.split(",") if word not in RECIPES]
    if unknown:
        raise ValueError(f"--recipes {recipes}: there is no recipe {unknown[0]!r}; use some of {','.join(RECIPES)}")
    config = resolve_precision(load_config(path, overrides or []))[0]
    with tempfile.TemporaryDirectory(prefix="amfm_numerics_") as folder:
        result = compare_recipes(config, names, steps=steps, seeds=seeds, folder=Path(folder), report=say)
    if as_json:
        print_json(result)
    else:
        print_numerics(result, str(path))
    excess = [] if limit is None else find_excess(result, limit)
    for text in excess:
        say(text)
    if excess:
        raise typer.Exit(3)


def print_numerics(result: dict[str, Any], title: str) -> None:
    """Print a line for each recipe: losses, gap and spread, errors of gradients, and the most that quantising zeroes."""
    rows = []
    for name, found in result["recipes"].items():
        losses = [last_loss(own) for own in found["losses"]]
        spread = f" +- {found['spread']:.2%}" if found.get("spread") is not None else ""
        worst = max(found.get("zeroed", {}).items(), key=lambda item: item[1], default=("", 0.0))
        rows.append(
            (
                result["precision"] if name == WIDE else f"{name}, emulated" if found["emulated"] else name,
                " ".join(f"{loss:.4f}" for loss in losses),
                "" if name == WIDE else f"{found['gap']:+.2%}{spread}",
                " ".join(f"{kind} {error:.1%}" for kind, error in found.get("gradient_error", {}).items()),
                f"{worst[0]} {worst[1]:.1%}" if worst[0] else "",
            )
        )
    columns = ("recipe", "last losses, by seed", "gap", "errors of gradients", "zeroed most")
    print_rows(f"{title}, {result['steps']} steps", columns, rows)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


if __name__ == "__main__":
    main(numerics)
