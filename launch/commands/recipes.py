"""The verb that finds the recipes that come with amfm: recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows
from amfm.launch.existing import nearest_or_all

FOLDER = Path(__file__).parents[2] / "recipes"  # amfm/recipes, which a clone has as src/amfm/recipes


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print the path of this recipe; default: list all.")
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """The verb `recipes`."""
    found = find_recipes()
    if name is None:
        if as_json:
            print_json({"folder": str(FOLDER), "recipes": found})
        else:
            print_rows(f"Recipes in {FOLDER}", ("name", "what"), found.items())
        return
    if name not in found:
        raise ValueError(f"{name} is not a recipe; {nearest_or_all(name, found)}")
    path = FOLDER / f"{name}.sh"
    if as_json:
        print_json({"path": str(path)})
    else:
        print(path)


def find_recipes() -> dict[str, str]:
    """Name to the first line of each script."""
    scripts = sorted(FOLDER.glob("*.sh"))
    heads = {path.stem: path.read_text(encoding="utf-8").splitlines()[1] for path in scripts}
    return {name: head.removeprefix("# ").partition(" Page: ")[0] for name, head in heads.items()}


def add_verbs(app: typer.Typer) -> None:
    """Register the verb of this file."""
    app.command(epilog="Example: amfm recipes one_gpu")(recipes)
