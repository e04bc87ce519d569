"""Parts of one's own without a package: registered in this process, or by a folder that a configuration names.

`register(Kind(...))` does what the entry point of an installed package does: afterwards patterns, sections, overrides and messages
know the part. Sections are pydantic models that were made before, so a field is added to the section of the part's group and
every model that contains it is built again. What is registered under a name of before replaces it, as in a notebook whose cell is
run again.

A folder is a package whose `__init__.py` registers what it has. It is imported on its own, under its name: nothing else next to it,
nor in the working directory, can be imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from amfm.model.config.plugins import CACHES, IN_PROCESS, SPEC_NAME, PluginSections, Registered
from amfm.model.config.section import Section


@dataclass
class Present:
    """source: of what is being registered. only_reads: whether configurations name no code that is run."""

    source: str = "this process"
    only_reads: bool = False


PRESENT = Present()


def register(*specs: Registered) -> None:
    """Register kinds of block, routers, hooks, schedules, optimizers and code about documents in this process, by their specs.

    A spec may have the class or function itself instead of an import path. Raises ValueError for a name that is not
    lower case, or that amfm or an installed package has.
    """
    for spec in specs:
        if not SPEC_NAME.fullmatch(spec.name):
            raise ValueError(
                f"{type(spec).__name__} {spec.name!r} must have a lower-case name of letters, digits and _"
            )
        if (table := getattr(spec, "registered", None)) is not None:  # of kinds that have no options
            table[spec.name] = spec
            continue
        section = next((each for each in _below(PluginSections) if vars(each).get("group") == spec.group), None)
        made = [] if section is None else [each for each in _below(section) if each.__base__ is section]
        before = {known.name for _, known in IN_PROCESS.get(spec.group, ())}
        if made and spec.name in made[0].model_fields and spec.name not in before:
            raise ValueError(f"{spec.name!r} is registered by amfm or an installed package; use another name")
        kept = [(entry, known) for entry, known in IN_PROCESS.get(spec.group, ()) if known.name != spec.name]
        IN_PROCESS[spec.group] = [*kept, (EntryPoint(spec.name, PRESENT.source, spec.group), spec)]
        for clear in CACHES:
            clear()
        if made:
            _add_section(made[0], spec)


def _add_section(section: type[PluginSections], spec: Registered) -> None:
    """Give a section the options of a part, and build it and all that contains it again."""
    annotation: Any = spec.options | None
    info = FieldInfo.from_annotated_attribute(annotation, Field(None, description="Registered in this process."))
    section.__pydantic_fields__[spec.name] = info
    section.__annotations__[spec.name] = annotation
    section.packages = {**section.packages, spec.name: PRESENT.source}
    for each in _below(Section):
        kind = each.model_fields.get(section.chooser)
        names = () if kind is None else get_args(kind.annotation)
        if any(info.annotation is section for info in each.model_fields.values()) and kind and spec.name not in names:
            kind.annotation = Literal[(*names, spec.name)]
    done: dict[type[BaseModel], bool] = {}
    for each in _below(Section):
        _rebuild(each, section, done)


def _rebuild(model: type[BaseModel], changed: type[BaseModel], done: dict[type[BaseModel], bool]) -> bool:
    """Build a model again, after those inside it, where it contains the changed one; returns whether it does."""
    if model in done:
        return done[model]
    done[model] = model is changed
    inside = [kind for info in model.model_fields.values() for kind in _models_in(info.annotation)]
    # A list and not any(): all of them are built before the model is.
    if any([_rebuild(kind, changed, done) for kind in inside]):
        done[model] = True
    if done[model]:
        model.model_rebuild(force=True)
    return done[model]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _below(kind: type[Any]) -> Iterator[type[Any]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


def load_folder(path: str | Path) -> None:
    """Import a folder as the package of its name, whose `__init__.py` registers its parts or lists them in SPECS; once.

    Raises ValueError for what is not such a folder, and for a name that another module has. An error of its code passes.
    """
    folder = Path(os.path.expanduser(path)).absolute()
    name, file = folder.name, folder / "__init__.py"
    there = sys.modules.get(name)
    if there is not None and getattr(there, "__file__", None) == str(file):
        return
    if not file.is_file():
        raise ValueError(f"{path} must be a folder with an __init__.py that calls amfm.register; name another")
    if not name.isidentifier() or there is not None or importlib.util.find_spec(name) is not None:
        raise ValueError(
            f"{path} cannot be imported as {name!r}, which is another module, or not a name; rename the folder"
        )
    found = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(folder)])
    assert found is not None and found.loader is not None, "a file of Python"
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    before, PRESENT.source = PRESENT.source, f"the folder {folder}"
    try:
        found.loader.exec_module(module)
        register(*getattr(module, "SPECS", ()))
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        PRESENT.source = before


def only_read(reads: bool) -> None:
    """Whether configurations are only read from now on: then the folders that they name are not imported."""
    PRESENT.only_reads = reads


def load_named_folder(path: str) -> None:
    """Import a folder that a configuration names. Raises ValueError as `load_folder`, and if configurations are only read."""
    module = sys.modules.get(Path(path).name)
    is_loaded = getattr(module, "__file__", None) == str(Path(os.path.expanduser(path)).absolute() / "__init__.py")
    if PRESENT.only_reads and not is_loaded:
        raise ValueError(
            f"{path} is code, and a configuration that is only read runs none; name it yourself if you trust it: "
            f"`amfm --plugins {path} ...`"
        )
    load_folder(path)
