"""Paths and names of a command line, judged before anything heavy is imported: what is not there is answered with near names.

Configurations that come with amfm are known by name: those of configs/, in a clone and in a wheel alike.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
URL = re.compile(r"[a-z][a-z0-9+.-]+:/")  # a Path has one slash after the colon


def require(path: Path, remedy: str) -> Path:
    """Return a path that exists, or a URL. Raises FileNotFoundError with the nearest name, else with the fix."""
    if URL.match(str(path)) or path.exists():
        return path
    near = nearest_paths(path)
    advice = f"did you mean {near[0]}?" if near else remedy
    raise FileNotFoundError(f"{path} does not exist; {advice}")


def require_exists(path: Path) -> Path:
    """Typer callback of a path that must exist."""
    return require(path, "name an existing one")


def require_all_exist(paths: list[Path]) -> list[Path]:
    """Typer callback of paths that must exist."""
    return [require_exists(path) for path in paths]


def require_model(path: Path) -> Path:
    """Typer callback of a model's folder, or a .tiktoken file, that must exist.

    A name of the Hugging Face Hub is answered with the command that downloads it. Raises RuntimeError for a checkpoint that
    was never completed.
    """
    from amfm.pretrain.checkpoint.manifest_file import CHECKPOINT_NAME, MANIFEST_NAME, read_manifest

    if path.is_file() and path.suffix != ".tiktoken":
        raise ValueError(f"{path} is a file; name the folder of a model")
    is_hub_name = HUB_NAME.fullmatch(str(path)) and not path.parent.exists()
    download = (
        f"to take it from the Hugging Face Hub: hf download {path} --local-dir {path.name}, then name {path.name}"
    )
    require(path, download if is_hub_name else "name an existing folder")
    if CHECKPOINT_NAME.fullmatch(path.name) and not (path / MANIFEST_NAME).exists():
        read_manifest(path)
    return path


def nearest_paths(path: Path) -> list[Path]:
    """Paths that exist and differ from this one in a part that is spelled nearly alike, nearest first."""
    present = path
    while not present.parent.exists():
        present = present.parent
    rest = path.relative_to(present)
    try:
        names = [entry.name for entry in present.parent.iterdir()]
    except OSError:
        return []
    near = [present.with_name(name) / rest for name in rank_names(present.name, names)]
    return [found for found in near if found.exists()]


def rank_names(name: str, names: Sequence[str]) -> list[str]:
    """Names that are spelled nearly as `name`, nearest first; those that it begins count as near."""
    stem = Path(name).stem
    begun = [
        other for other in names if len(stem) > 3 and other.startswith(stem) and Path(other).suffix == Path(name).suffix
    ]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.7)
    return list(dict.fromkeys([*(other for other in close if other in begun), *begun, *close]))


def nearest_or_all(name: str, names: Collection[str]) -> str:
    """What to write instead of a name that is unknown: the nearest of those that are known, or all of them."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"do you mean {near[0]}?" if near else f"use one of {', '.join(names)}"


FOLDER = Path(__file__).parents[1] / "configs"  # amfm/configs, which a clone has as src/amfm/configs
APART = ("anchors", "base", "studies")  # not runs: models of published speeds, files to extend, settings of studies


def preset_names() -> list[str]:
    """Names of all presets, such as `tiny_cpu` and `probes/mqar`."""
    paths = [path.relative_to(FOLDER).with_suffix("") for path in sorted(FOLDER.glob("**/*.yaml"))]
    return [path.as_posix() for path in paths if path.parts[0] not in APART]


def preset_path(name: str) -> Path:
    """The file of a preset. Raises ValueError for an unknown name, with the nearest one or all of them."""
    names = preset_names()
    if name in names:
        return FOLDER / f"{name}.yaml"
    raise ValueError(f"--preset {name}: amfm has no preset of this name; {nearest_or_all(name, names)}")


def choose_config(path: Path | None, overrides: Sequence[str] | None, preset: str | None) -> tuple[Path, list[str]]:
    """The configuration file and overrides of a verb's arguments, of which the first is an override under --preset.

    Raises ValueError if a configuration is given twice or not at all, FileNotFoundError where the file is not there.
    """
    words = list(overrides or [])
    if preset is None:
        if path is None:
            raise ValueError("no CONFIG.yaml given; name a file, or a preset: --preset tiny_cpu")
        if not path.exists() and path.with_suffix("").name in preset_names():
            raise FileNotFoundError(f"{path} does not exist; a preset has this name: --preset {path.stem}")
        near = difflib.get_close_matches(path.stem, preset_names(), n=1, cutoff=0.8)
        remedy = f"did you mean --preset {near[0]}?" if near else "name an existing YAML file"
        return require(path, remedy), words
    if path is not None:
        if "=" not in str(path):
            raise ValueError(f"{path} and --preset {preset} both name a configuration; give one of them")
        words.insert(0, str(path))
    return preset_path(preset), words


def load_packaged(name: str, *folders: str) -> Any:
    """Load what an installed package brings to the command line, an entry point of the group `amfm.verbs`.

    A verb is a function of typer's or a typer application. A part of one, such as `import.training-state`, is a function that gets what the verb has parsed.
    Raises ValueError if there is none; folders: of examples/, to install together.
    """
    from importlib.metadata import entry_points

    for entry in entry_points(group="amfm.verbs", name=name):
        return entry.load()
    verb, _, part = name.partition(".")
    words = f"{verb} ({part})" if part else verb
    places = " ".join(f"./examples/{folder}" for folder in folders)
    raise ValueError(f"amfm {words} is in a package that is not installed; in a clone of amfm: pip install {places}")
