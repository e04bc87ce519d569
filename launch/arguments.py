"""Arguments and options that several verbs share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from amfm.launch.console import print_rows, say
from amfm.launch.existing import require_exists, require_model
from amfm.pretrain.packages import require_extra


def choose_device(name: str) -> str:
    """Resolve `auto` to a device type. Raises ValueError for a CUDA that torch does not see."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; use --device cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Place:
    """Where and how a verb computes: device, kernels, precision, and how many ranks do it together."""

    device: str
    backend: str
    precision: Literal["float32", "bf16"]
    num_ranks: int
    is_first: bool

    @classmethod
    def of_options(cls, device: str, backend: str, precision: Literal["float32", "bf16"] | None) -> Place:
        """From options, and from the variables of a rank. Raises ValueError for a CPU if ranks would take GPUs."""
        num_ranks, chosen = int(os.environ.get("WORLD_SIZE", "1")), choose_device(device)
        if num_ranks > 1 and chosen == "cpu" and choose_device("auto") == "cuda":
            raise ValueError(
                "--device cpu does not reach ranks, which use a GPU each; set CUDA_VISIBLE_DEVICES= for CPUs"
            )
        is_first = os.environ.get("RANK", "0") == "0"
        return cls(chosen, backend, precision or ("float32" if num_ranks == 1 else "bf16"), num_ranks, is_first)

    def announce(self, text: str) -> None:
        """Say something of all ranks, once."""
        if self.is_first:
            say(f"amfm evaluate: {text}")


PICTURE_FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Check that a picture can be written, before any work is done. Raises ValueError."""
    if path.suffix not in PICTURE_FORMATS:
        raise ValueError(
            f"--picture {path} must end in one of {', '.join(PICTURE_FORMATS)}; use {path.stem or 'picture'}.png"
        )
    if not path.parent.is_dir():
        raise ValueError(f"--picture {path}: {path.parent} is not a folder; create it, or name another path")
    require_extra("report", f"--picture {path}")


ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration file of the run.", callback=require_exists)
]
# Of verbs that take a preset in its place.
ConfigOrPreset = Annotated[
    Path | None, typer.Argument(metavar="CONFIG.yaml", help="The configuration file of the run.", show_default=False)
]
PresetOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Use a preset that comes with amfm instead of CONFIG.yaml."),
]


OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Overrides such as train.steps=20 or data.sources.0.weight=2."),
]


CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A run directory (newest checkpoint), a checkpoint or an import.",
        callback=require_model,
    ),
]

WeightsOption = Annotated[
    Literal["last", "ema"], typer.Option(help="The weights themselves, or the moving average that the run keeps (ema).")
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout; messages go to stderr.")]


def show_help_all(context: typer.Context, asked: bool) -> None:
    """Typer callback: print the verb's help and every setting, then exit."""
    if not asked or context.resilient_parsing:
        return
    text = context.get_help()
    if text:  # where it is not printed by rich already
        typer.echo(text)
    print_fields()
    raise typer.Exit


HelpAllOption = Annotated[
    bool,
    typer.Option(
        "--help-all", is_eager=True, callback=show_help_all, help="Show this message and every setting, and exit."
    ),
]


def print_fields() -> None:
    """Print every setting with type, default and meaning, from the schema."""
    from amfm.pretrain.config.fields import describe_fields

    rows = [
        (row.key, row.type, "required" if row.default is None else row.default, row.meaning)
        for row in describe_fields()
    ]
    print_rows("Settings (as keys of the file or as KEY=VALUE)", ("key", "type", "default", "meaning"), rows)
