"""Verb config.

The verb that finds the recipes that come with amfm: recipes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amfm.launch.arguments import HelpAllOption, JsonOption, OverridesArgument, PresetOption, print_fields
from amfm.launch.console import print_json, print_rows
from amfm.launch.existing import choose_config, nearest_or_all

if TYPE_CHECKING:
    from amfm.pretrain.config.schema import RunConfig


def config(
    path: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", help="The configuration file.")] = None,
    overrides: OverridesArgument = None,
    *,
    preset: PresetOption = None,
    diff: Annotated[Path | None, typer.Option(metavar="OTHER.yaml", help="Print only what differs from OTHER.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Also check whether this many ranks can run it.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON Schema of configuration files.")] = False,
    fields: Annotated[
        bool, typer.Option("--fields", help="List every setting with type, default and meaning.")
    ] = False,
    show_precision: Annotated[
        bool, typer.Option("--show-precision", help="List the number format that each kind of block multiplies in.")
    ] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Print docs/configuration.md.")] = False,
    help_all: HelpAllOption = False,
    as_json: JsonOption = False,
) -> None:
    """The verb `config`."""
    if schema or fields or reference:
        print_about_schema(schema=schema, reference=reference, as_json=as_json)
        return
    if path is None and preset is None:
        raise ValueError("no CONFIG.yaml given; name a file, or ask for --preset, --schema, --fields or --reference")
    path, overrides = choose_config(path, overrides, preset)
    from amfm.pretrain.checks.load import load_checked
    from amfm.pretrain.config.file import diff_configs, load_config, resolved_yaml

    resolved = load_checked(path, overrides or [], world_size=ranks)
    if show_precision and diff is not None:
        raise ValueError("--show-precision and --diff print different things; give one of them")
    if show_precision:
        from amfm.pretrain.startup.arithmetic import settle_precision

        print_precision(settle_precision(resolved)[0], str(path), as_json=as_json)
    elif diff is not None:
        differences = diff_configs(load_config(diff), resolved)
        if as_json:
            print_json({item.key: {"other": item.first, "this": item.second} for item in differences})
        else:
            print_rows(
                f"{diff} -> {path}", ("key", str(diff), str(path)), [(d.key, d.first, d.second) for d in differences]
            )
    elif as_json:
        print_json(resolved.model_dump(mode="json"))
    else:
        sys.stdout.write(resolved_yaml(resolved))


def print_precision(resolved: RunConfig, title: str, *, as_json: bool) -> None:
    """Print the number format that each kind of block multiplies in."""
    from amfm.model.low_precision import describe_indices, precision_table

    rows = precision_table(resolved.model, resolved.low_precision, resolved.train.precision)
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    lines = [
        (row.kind, row.weight, row.precision, str(len(row.blocks)), describe_indices(row.blocks), f"{row.numel:,}")
        for row in rows
    ]
    print_rows(f"Products of {title}", ("kind", "weight", "precision", "blocks", "which", "parameters in each"), lines)


def print_about_schema(*, schema: bool, reference: bool, as_json: bool) -> None:
    """Print the schema itself: as JSON schema, as reference page or as a list of fields."""
    from amfm.pretrain.config.fields import describe_fields, reference_page
    from amfm.pretrain.config.file import config_schema

    if schema:
        print_json(config_schema())
    elif reference:
        sys.stdout.write(reference_page())
    elif as_json:
        print_json(
            {row.key: {"type": row.type, "default": row.default, "meaning": row.meaning} for row in describe_fields()}
        )
    else:
        print_fields()


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
    """Register the verbs of this file."""
    app.command(
        epilog="Example: amfm config configs/tiny_cpu.yaml train.seed=1 --diff configs/tiny_cpu.yaml",
    )(config)
    app.command(epilog="Example: amfm recipes one_gpu")(recipes)
