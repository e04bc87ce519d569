"""Verbs about configurations: init writes a first one, config checks one, recipes finds those that come with amfm."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import HelpAllOption, JsonOption, OverridesArgument, PresetOption, print_fields
from amfm.launch.console import loading, print_json, print_pairs, print_rows, say
from amfm.launch.existing import choose_config, nearest_or_all
from amfm.launch.init.shapes import SIZES, STYLES, dial_size
from amfm.pretrain.launcher_protocol import INTERRUPTED
from amfm.pretrain.packages import require_extra

if TYPE_CHECKING:
    from amfm.launch.init.write import Written
    from amfm.pretrain.config.schema import RunConfig


QUESTIONS = {
    "size": "Size of the model ({})",
    "style": "Style ({})",
    "data": "Text: a file, folder, glob, URL or hub:OWNER/NAME",
    "hardware": "Hardware (cpu, 1xh100, 8xh100, 64xb200, 8xFILE.yaml)",
}
CHOICES: dict[str, tuple[str, ...]] = {"size": tuple(SIZES), "style": tuple(STYLES)}
DEFAULTS = {"size": "3m", "style": "nemotron", "hardware": "cpu"}
SIZE_FOR_GPUS = "20m"
# What the preset of a size is planned for.
PLANNED_FOR = {
    "3m": "two CPU cores",
    "20m": "8 H100",
    "150m": "8 H100",
    "1b": "8 H100",
    "8b": "64 H100",
    "30b": "64 H100",
}
WORDS = {"active_parameters": "active per token", "memory_gib": "memory of the most loaded rank"}  # of facts


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for run.yaml; created if missing.")] = Path(),
    *,
    size: Annotated[str | None, typer.Option(metavar="|".join(SIZES), help="Approximate number of parameters.")] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Layers, instead of --size: width, tokens, batch and rate follow by scaling laws."
        ),
    ] = None,
    style: Annotated[
        str | None, typer.Option(metavar="|".join(STYLES), help="Model family whose blocks to use.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Text: a file, folder, glob, URL or hub:OWNER/NAME.")
    ] = None,
    hardware: Annotated[str | None, typer.Option(metavar="cpu|8xh100|8xFILE.yaml", help="Target hardware.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `init`."""
    path = folder / "run.yaml"
    if path.exists():  # before anything is asked
        raise ValueError(f"{path} is there already; name another folder, or move it away")
    require_extra("data", "amfm init")
    if depth is not None:
        size = check_depth(depth, size)
    given = {"size": size, "style": style, "data": data, "hardware": hardware}
    defaults = DEFAULTS | ({} if hardware in (None, "cpu") else {"size": SIZE_FOR_GPUS})
    answers = {
        name: ask(name, defaults) if value is None else value if name == "size" and depth else check(name, value)
        for name, value in given.items()
    }
    with loading("init"):
        from amfm.launch.init.machine import find_machine
        from amfm.launch.init.write import Answers, next_commands, write_config

    asked = Answers(
        folder, answers["size"], answers["style"], answers["data"], find_machine(answers["hardware"]), depth
    )
    with Waiting("amfm init") as waiting:
        waiting("planning layouts, and on a CPU timing passes of the model")
        written = write_config(asked)
    facts, commands = describe(written), next_commands(asked)
    if as_json:
        print_json(facts | {"warnings": list(written.warnings), "next": commands})
        return
    millions = {key: f"{facts[key] / 1e6:,.1f}M" for key in ("parameters", "active_parameters")}
    millions["parameters"] += f", with a vocabulary of {written.choice.config.model.vocab_size:,}"
    shown = facts | millions | {"memory_gib": f"{facts['memory_gib']} GiB"}
    print_pairs("Configuration", ((WORDS.get(key, key), value) for key, value in shown.items()))
    for warning in written.warnings:
        say(f"warning: {warning}")
    say("next:\n" + "\n".join(f"  {command}" for command in commands))


def check_depth(depth: int, size: str | None) -> str:
    """Name of a depth as a size. Raises ValueError for a depth that makes no model, and where both are given."""
    if size is not None:
        raise ValueError(f"--depth {depth} and --size {size} both set how large the model is; give one of them")
    try:
        dial_size(depth)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    return f"d{depth}"


def ask(name: str, defaults: Mapping[str, str]) -> str:
    """Ask a person at a terminal. Raises ValueError if there is none."""
    if not sys.stdin.isatty():
        raise ValueError(
            f"--{name} is not given, and there is no terminal to ask at; add --{name} {defaults.get(name, 'PATH')}"
        )
    text = QUESTIONS[name].format(", ".join(CHOICES.get(name, ())))
    if name == "size":
        say("\n".join(describe_sizes()))
    default = defaults.get(name, "")
    while True:
        try:
            return check(name, str(typer.prompt(text, default=default, show_default=bool(default), err=True)))
        except ValueError as error:
            say(str(error).removeprefix(f"--{name} "))
        except typer.Abort:  # Ctrl-C, which typer would end with 1
            raise typer.Exit(INTERRUPTED) from None


def describe_sizes() -> Iterator[str]:
    """One line for each size: how much it trains on by default, and for which hardware its preset is planned."""
    from amfm.pretrain.report.numbers import count

    for name, size in SIZES.items():
        tokens = size.steps * size.global_batch_size * size.sequence_length
        yield f"  {name:>5}  {count(tokens):>5} tokens in {size.steps:,} steps of {size.global_batch_size:,} x {size.sequence_length:,}; planned for {PLANNED_FOR[name]}"


def check(name: str, value: str) -> str:
    """An answer as it is used. Raises ValueError for one that cannot be, before the next question is asked."""
    if name in CHOICES:
        if value.lower() not in CHOICES[name]:
            raise ValueError(f"--{name} {value} must be one of {', '.join(CHOICES[name])}")
        return value.lower()
    if not value:
        raise ValueError(f"--{name} needs an answer: name a file or a folder of text, such as data/corpus/shakespeare")
    if name == "data":
        from amfm.launch.init.text import describe_text

        describe_text(value)
    if name == "hardware":
        from amfm.launch.init.machine import find_machine

        find_machine(value)
    return value


def describe(written: Written) -> dict[str, Any]:
    """What was written, for the table and for JSON."""
    from amfm.model.flops import count_parameters

    choice = written.choice
    counts = count_parameters(choice.config.model)
    return {
        "config": str(written.path),
        "parameters": counts.total,
        "active_parameters": counts.active,
        "layout": choice.estimate.layout.describe(),
        "recompute": choice.config.train.recompute,
        "memory_gib": round(choice.estimate.memory.total() / 2**30, 1),
    }


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
        from amfm.pretrain.startup.arithmetic import resolve_precision

        print_precision(resolve_precision(resolved)[0], str(path), as_json=as_json)
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
        epilog="Example: amfm init shakespeare --size 3m --style nemotron --data data/corpus/shakespeare --hardware cpu"
    )(init)
    app.command(
        epilog="Example: amfm config configs/tiny_cpu.yaml train.seed=1 --diff configs/tiny_cpu.yaml",
    )(config)
    app.command(epilog="Example: amfm recipes one_gpu")(recipes)
