"""What installed packages register: specs under the names of their entry points' groups.

Specs come from installed packages, from this process and from folders that a configuration names (registering.py); reading a
file for anything else than to train runs no code that was not installed on purpose.

Their sections are options of the configuration like ours, and yet what is saved must not depend on what is installed: one
that is not set is not written, and one that is set is saved with the name of its package.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer

from amfm.model.config.section import Section

MORE_MIXERS = (
    "comba",
    "fox",
    "gla",
    "gdn2",
    "hedgehog",
    "lightning",
    "lightnet",
    "log_linear",
    "mala",
    "mamba1",
    "mamba3",
    "mesa",
    "mom",
    "ngram_memory",
    "plstm",
    "retnet",
    "rwkv7",
    "transnormer",
)
SPEC_NAME = re.compile(r"[a-z][a-z0-9_]*")
# Folders of examples/ that register a mixer, head, hook or adapter of a name, for messages where they are not installed.
EXAMPLES = {
    "bip": ("bip",),
    "envelope": ("envelope",),
    "flora": ("flora",),
    "fourier_head": ("fourier_head",),
    "longvq": ("mixers", "seqboat", "longvq"),
    "lssl": ("s4d",),
    "maestro": ("maestro",),
    "mlflow": ("mlflow",),
    "monarch": ("monarch",),
    "prometheus": ("serve", "prometheus"),
    "relative_attention": ("relative_attention",),
    "s4d": ("s4d",),
    "seqboat": ("mixers", "seqboat"),
    "window_linear": ("convert",),
    **dict.fromkeys(MORE_MIXERS, ("mixers",)),
}


class Spec(Protocol):
    """What an entry point names: it says what it is called in a configuration."""

    @property
    def name(self) -> str:
        """Lower case."""


class Registered(Spec, Protocol):
    """What can be registered in a process: it says in which group, and has a section of options."""

    group: ClassVar[str]

    @property
    def options(self) -> type[Section]:
        """Its section."""


S = TypeVar("S", bound=Spec)
IN_PROCESS: dict[str, list[tuple[EntryPoint, Registered]]] = {}  # by group
CACHES: list[Callable[[], None]] = []  # to clear when something is registered
F = TypeVar("F", bound=Callable[..., Any])


def until_registered(cached: F) -> F:
    """Decorate a cached function whose answer depends on what is registered."""
    CACHES.append(cached.cache_clear)  # type: ignore[attr-defined]
    return cached


def installed_specs(group: str, kind: type[S]) -> Iterator[tuple[EntryPoint, S]]:
    """Import the specs that installed packages register in a group, with their entry points.

    Raises RuntimeError for one that cannot be imported or is of another kind: the installation is at fault, not a setting.
    """
    for entry, registered in IN_PROCESS.get(group, ()):
        assert isinstance(registered, kind), "a group has one kind of spec"
        yield entry, registered
    for entry in entry_points(group=group):
        try:
            spec = entry.load()
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"{describe_entry(entry)} cannot be loaded ({error}{what_changed(error)}); fix or uninstall its package"
            ) from error
        if not isinstance(spec, kind) or not SPEC_NAME.fullmatch(spec.name):
            raise RuntimeError(
                f"{describe_entry(entry)} is {spec!r}; it must be a {kind.__name__} with a lower-case name: fix its package"
            )
        yield entry, spec


def specs_by_name(group: str, kind: type[S], taken: Collection[str], what: str) -> dict[str, S]:
    """Collect the specs of a group by name, each `what` with its article. Raises RuntimeError also for a name that is taken."""
    specs: dict[str, S] = {}
    for entry, spec in installed_specs(group, kind):
        if spec.name in specs or spec.name in taken:
            raise RuntimeError(
                f"{describe_entry(entry)} registers {what} {spec.name!r}, which there is already; uninstall one"
            )
        specs[spec.name] = spec
    return specs


def load_named(path: Any) -> Any:
    """Import what `package.module:name` names; a class or function of this process is itself."""
    if not isinstance(path, str):
        return path
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def what_changed(error: Exception) -> str:
    """Report what has another name now, where an error says that a package was written for an older amfm; else
    nothing.
    """
    missing = (getattr(error, "name", None) or "").split(".")
    if "mixer_registry" in missing:
        return "; a MixerSpec is a Kind of amfm.model.config.kinds now, and cut_evenly of its options is by axis"
    if missing[0] in ("pretrain", "model", "kernels", "data_pipeline", "launch"):
        return f"; it is imported as amfm.{'.'.join(missing)} now"
    return ""


def how_to_install(name: str, otherwise: str) -> str:
    """The command that installs the package of this name, where it is one of ours in examples/."""
    folders = EXAMPLES.get(name)
    if folders is None:
        return otherwise
    package = f"amfm-{folders[-1].replace('_', '-')}"
    command = " ".join(f"./examples/{folder}" for folder in folders)
    remedy = f"install {package}, which registers it: `pip install {command}` in a checkout of amfm"
    if name in MORE_MIXERS:
        remedy += ", or add `plugins: [examples/mixers/amfm_mixers]` to the configuration (`amfm --plugins FOLDER` for a checkpoint)"
    return remedy


class PluginSections(Section):
    """The base of a section of sections, one a mixer or hook, which installed packages add to.

    group: of the entry points. chooser: the setting next to it that names one, where one does. packages: name and version of the package that registers each name that is not ours.
    """

    group: ClassVar[str]
    chooser: ClassVar[str] = "kind"
    packages: ClassVar[Mapping[str, str]] = {}

    @model_serializer(mode="wrap")
    def write_what_is_set(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write all of ours, and those of packages that are set."""
        written: dict[str, Any] = write(self)
        return {name: value for name, value in written.items() if value is not None or name not in self.packages}

    def __getattr__(self, name: str) -> Any:
        """None for a part that was registered after this section was read."""
        if name in type(self).model_fields:
            return None
        return super().__getattr__(name)  # type: ignore[misc]

    def packages_used(self) -> dict[str, str]:
        """The packages of the sections that are set, by the sections' names."""
        return {name: package for name, package in self.packages.items() if getattr(self, name) is not None}


P = TypeVar("P", bound=PluginSections)


def with_sections(fields: Mapping[str, tuple[type[Section], str]]) -> Callable[[type[P]], type[P]]:
    """Decorate a section of sections: an optional field for each, of its type and description.

    So files, overrides, the schema and its pages treat sections of packages like ours.
    """
    optional: dict[str, Any] = {
        name: (kind | None, Field(None, description=words)) for name, (kind, words) in fields.items()
    }

    def add(base: type[P]) -> type[P]:
        made: type[P] = create_model(base.__name__, __base__=base, __module__=base.__module__, **optional)
        made.__doc__ = base.__doc__
        return made

    return add


def read_saved_sections(saved: Any, schema: type[PluginSections], key: str, packages: Mapping[str, str]) -> Any:
    """What a program with other packages saved as `key`, without the sections that mean nothing here and are not set.

    packages: those saved with it, by dotted key. Raises ValueError for a section that is set and that nothing here registers.
    """
    if not isinstance(saved, Mapping):
        return saved
    for name in sorted(saved.keys() - schema.model_fields.keys()):
        if saved[name] is not None:
            package = packages.get(f"{key}.{name}", "a package whose name was not saved with it")
            raise ValueError(
                f"the saved section {key}.{name} is of {package}, which is not installed here (nothing registers {name!r} "
                f"under the entry point group {schema.group}); {how_to_install(name, 'install it')}"
            )
    return {name: value for name, value in saved.items() if name in schema.model_fields}


def leave_out_unset(settings: Any) -> None:
    """Remove null sections of mixers of examples/ in place: run directories of before list all that became a package since."""
    model = settings.get("model") if isinstance(settings, dict) else None
    mixers = model.get("mixers") if isinstance(model, dict) else None
    if isinstance(mixers, dict):
        for name in EXAMPLES.keys() & {name for name, options in mixers.items() if options is None}:
            del mixers[name]


def list_packages(group: str, kind: type[Spec]) -> dict[str, str]:
    """Name and version of the package behind each spec of a group, by the spec's name."""
    return {
        spec.name: entry.value if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
        for entry, spec in installed_specs(group, kind)
    }


def package_modules() -> set[str]:
    """Top modules of the packages that register anything, by which their frames in a traceback are known."""
    groups = [group for group in entry_points().groups if group.startswith("amfm.")]
    modules = {entry.module for group in groups for entry in entry_points(group=group)}
    for specs in IN_PROCESS.values():
        parts = [part for _, spec in specs for part in vars(spec).values()]
        modules |= {part.partition(":")[0] for part in parts if isinstance(part, str) and ":" in part}
        modules |= {part.__module__ for part in parts if callable(part)}
    return {module.partition(".")[0] for module in modules} - {"amfm"}


def describe_entry(entry: EntryPoint) -> str:
    """Describe an entry point and its package, for messages."""
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    return f"the entry point {entry.name} = {entry.value} of {package} (group {entry.group})"
