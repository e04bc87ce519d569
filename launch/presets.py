"""Configurations that come with amfm, by name: those of configs/, in a clone and in a wheel alike."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from amfm.launch.existing import nearest_or_all, require

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
