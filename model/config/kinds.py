"""The table of the kinds of block: one row a kind, ours and those of installed packages.

A kind is its row here, its options (`MixerOptions`, options.py) and its mixer (`Mixer`, model/mixers/interface.py). Whoever
wants to know something of a block asks its options or its mixer; no one compares letters. Four kinds are core: their
section is a field of the model's configuration (`model.mamba`) and their options are counted in closed form. All others
have theirs below `model.mixers` and are counted on one that is built.

A package registers a kind with an entry point of the group `amfm.mixers` that names a `Kind`. A row names the class of the
mixer by its import path and does not hold it, because configurations are read and documented where torch is not imported;
the class is loaded when a model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple

from amfm.model.config import mixer_options as own
from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.key_mixer_options import MlaOptions, WindowOptions
from amfm.model.config.moe import MoeConfig
from amfm.model.config.options import MixerOptions, ParallelOptions
from amfm.model.config.plugins import (
    EXAMPLES,
    how_to_install,
    list_packages,
    load_named,
    specs_by_name,
    until_registered,
)

ENTRY_POINTS = "amfm.mixers"


class Products(NamedTuple):
    """The weights of a kind of block, by their names below its mixer, whose products low precision may make in fewer bits.

    out: an output projection that a recipe treats apart (`low_precision.out_proj_recipe`); None if there is none.
    """

    inner: tuple[str, ...] = ()
    out: str | None = None


NO_PRODUCTS = Products()


@dataclass(frozen=True)
class Kind:
    """A kind of block as pattern, configuration and checks see it, without importing its mixer.

    name: lower case, as in `{name}`. mixer: `package.module:Class`, or the class in a process that registers it, an `amfm.model.mixers.interface.Mixer`. options: its
    section, whose class docstring and field descriptions become the documentation. rejects: axes over which it cannot be
    spread yet, with the reason. mixes: whether a token reads others, or only its own channels; `logits`: a head, an
    `amfm.model.loss.Head` that `model.head` names. letter, aliases: in a
    pattern. title: in messages. is_core: its section is a field of the model's configuration. has_mup: muP's rules were
    measured on it (docs/mup.md). products: of which low precision makes some in fewer bits (docs/low_precision.md). modeling: `package.module:Class`,
    its form in plain PyTorch, which an export with our own modeling files carries (docs/hooks.md); "": the model stays in amfm.
    """

    group: ClassVar[str] = ENTRY_POINTS

    name: str
    mixer: str | type[Any]
    options: type[MixerOptions]
    refuses: Mapping[Literal["context", "tensor"], str] = field(default_factory=dict)
    mixes: Literal["sequence", "channels", "logits"] = "sequence"
    letter: str | None = None
    aliases: str = ""
    title: str = ""
    is_core: bool = False
    has_mup: bool = False
    products: Products = NO_PRODUCTS
    modeling: str = ""

    @property
    def parts(self) -> tuple[Kind, ...]:
        """The kinds whose sections it reads: itself, but for one of parallel heads."""
        return (self,)

    @property
    def symbol(self) -> str:
        """Its symbol in a pattern: its letter, or `{name}`."""
        return self.letter or f"{{{self.name}}}"

    @property
    def section(self) -> str:
        """Key of its options below `model`."""
        return self.name if self.is_core else f"mixers.{self.name}"

    @property
    def base(self) -> str:
        """Name of the kind whose mixer and form it has: its own, but for a variant."""
        return self.name

    def describe(self) -> str:
        """Name it in words."""
        return self.title or self.name.replace("_", " ")

    def read(self, model: Any) -> MixerOptions | None:
        """Its options in a model's configuration; None if the section is missing."""
        options: MixerOptions | None = attrgetter(self.section)(model)
        return options

    def load(self) -> type[Any]:
        """Import the class of its mixer."""
        found: type[Any] = load_named(self.mixer)
        return found


IN_OUT = Products(("in_proj.weight",), "out_proj.weight")
QKVO = Products(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
UP_DOWN = Products(("up_proj.weight", "down_proj.weight"))
EXPERTS = Products(("experts.up", "experts.down", "shared.up_proj.weight", "shared.down_proj.weight"))


@dataclass(frozen=True)
class ParallelKind(Kind):
    """Sequence mixers that read one norm side by side, `(M&*)`: their outputs are added in one residual block."""

    branches: tuple[Kind, ...] = ()

    @property
    def parts(self) -> tuple[Kind, ...]:
        """The mixers, in order."""
        return self.branches

    @property
    def symbol(self) -> str:
        """As it stands in a pattern."""
        return self.name

    def describe(self) -> str:
        """Name it in words."""
        return " and ".join(kind.describe() for kind in self.branches) + " in parallel"

    def read(self, model: Any) -> MixerOptions | None:
        """Those of all mixers, if none is missing."""
        options = [kind.read(model) for kind in self.branches]
        names = tuple(kind.name for kind in self.branches)
        return None if None in options else ParallelOptions(names=names, branches=tuple(options))


@dataclass(frozen=True)
class VariantKind(Kind):
    """A kind with other options under a name of its own, `{mamba_narrow}`; of: the kind (variants.py)."""

    of: str = ""

    @staticmethod
    def named(name: str) -> VariantKind | None:
        """The variant of this name: of the kind that it is named after, the longest; None if there is none, or it is a package's."""
        bases = [kind for kind in all_kinds().values() if name.startswith(f"{kind.name}_") and kind.mixes != "logits"]
        if not bases or name in EXAMPLES:
            return None
        base = max(bases, key=lambda kind: len(kind.name))
        same = {each.name: getattr(base, each.name) for each in fields(base)}
        own = {"name": name, "letter": None, "aliases": "", "title": "", "is_core": False, "of": base.name}
        return VariantKind(**(same | own))

    @property
    def section(self) -> str:
        """Key of its options below `model`."""
        return f"variants.{self.name}"

    @property
    def base(self) -> str:
        """Name of the kind."""
        return self.of

    def read(self, model: Any) -> MixerOptions | None:
        """Its options, None if there is no such variant."""
        options: MixerOptions | None = model.variants.get(self.name)
        return options


CORE = (
    Kind(
        "mamba",
        "amfm.model.mixers.mamba2:Mamba2Mixer",
        Mamba2Config,
        letter="M",
        title="Mamba2",
        is_core=True,
        has_mup=True,
        products=IN_OUT,
    ),
    Kind(
        "attention",
        "amfm.model.mixers.attention:AttentionMixer",
        AttentionConfig,
        letter="*",
        aliases="A",
        is_core=True,
        has_mup=True,
        products=QKVO,
    ),
    Kind(
        "moe",
        "amfm.model.moe.block:MoeMixer",
        MoeConfig,
        mixes="channels",
        letter="E",
        aliases="F",
        title="mixture of experts",
        is_core=True,
        has_mup=True,
        products=EXPERTS,
    ),
    Kind(
        "feed_forward",
        "amfm.model.feed_forward:FeedForwardMixer",
        FeedForwardConfig,
        mixes="channels",
        letter="-",
        aliases="D",
        title="dense feed-forward",
        is_core=True,
        has_mup=True,
        products=UP_DOWN,
    ),
)
BUILT_IN = (
    *CORE,
    Kind("deltanet", "amfm.model.mixers.delta:DeltaNetMixer", own.DeltaNetOptions, products=IN_OUT),
    Kind(
        "gated_deltanet",
        "amfm.model.mixers.delta:GatedDeltaNetMixer",
        own.GatedDeltaNetOptions,
        letter="G",
        has_mup=True,
        products=IN_OUT,
    ),
    Kind(
        "deltaproduct",
        "amfm.model.mixers.delta:DeltaProductMixer",
        own.DeltaProductOptions,
        letter="P",
        products=IN_OUT,
    ),
    Kind("hgrn2", "amfm.model.mixers.vector_gates:Hgrn2Mixer", own.Hgrn2Options, letter="H", products=IN_OUT),
    Kind("kda", "amfm.model.mixers.delta:KdaMixer", own.KdaOptions, letter="K", has_mup=True, products=IN_OUT),
    Kind(
        "short_conv", "amfm.model.mixers.short_conv:ShortConvMixer", own.ShortConvOptions, letter="C", products=IN_OUT
    ),
    Kind(
        "mla",
        "amfm.model.mixers.mla:MlaMixer",
        MlaOptions,
        letter="+",
        products=Products(("q_proj.weight", "kv_up.weight", "out_proj.weight")),
    ),
    Kind(
        "window",
        "amfm.model.mixers.window:WindowMixer",
        WindowOptions,
        letter="W",
        products=Products(("in_proj.weight", "out_proj.weight")),
    ),
)
# Letters of kinds that a package registers.
PACKAGE_LETTERS = {"L": "{lightning}"}
# Kinds by their letters in a pattern, aliases among them.
LETTERS = {letter: kind for kind in BUILT_IN for letter in f"{kind.letter or ''}{kind.aliases}"}


@until_registered
@cache
def all_kinds() -> dict[str, Kind]:
    """Collect all kinds by name: ours in the order above, then those of installed packages.

    Raises RuntimeError for an entry point that cannot be imported, is not a Kind, wants a letter or takes another's name.
    """
    ours = {kind.name: kind for kind in BUILT_IN}
    others = specs_by_name(ENTRY_POINTS, Kind, ours, "a mixer")
    for kind in others.values():
        if kind.letter or kind.aliases or kind.is_core:
            raise RuntimeError(
                f"the mixer {kind.name!r} of {list_packages(ENTRY_POINTS, Kind)[kind.name]} wants letters "
                f"({kind.letter}{kind.aliases}) or a core section, which only our own kinds have: a package's block is "
                f"written {{{kind.name}}}, with its options at model.mixers.{kind.name}"
            )
    return ours | others


def registered_kinds() -> dict[str, Kind]:
    """The kinds whose options are below `model.mixers`, by name."""
    return {name: kind for name, kind in all_kinds().items() if not kind.is_core}


def find_kind(name: str) -> Kind:
    """Look up the kind of this name, or the variant of one. Raises ValueError, which lists the kinds, for a name that is neither."""
    found = all_kinds().get(name) or VariantKind.named(name)
    if found is None:
        raise ValueError(
            f"no mixer is called {name!r}; there are {list_kinds()} and what packages register under the entry point group "
            f"{ENTRY_POINTS}: {how_to_install(name, 'install the package')}, or take another"
        )
    return found


def kind_of(symbol: str) -> Kind:
    """Look up the kind of a block by its symbol in a pattern; raises as `find_kind` does."""
    if symbol.startswith("("):
        branches = tuple(kind_of(part) for part in symbol.strip("()").split("&"))
        mixer = "amfm.model.mixers.parallel:ParallelMixer"
        return ParallelKind(symbol, mixer, ParallelOptions, branches=branches)
    return LETTERS[symbol] if symbol in LETTERS else find_kind(symbol.strip("{}"))


def list_kinds() -> str:
    """List all kinds as messages do: symbol and name."""
    return ", ".join(
        f"{' or '.join([kind.letter, *kind.aliases])} {kind.title or kind.name}" if kind.letter else kind.symbol
        for kind in all_kinds().values()
    )


def describe_symbol(symbol: str) -> str:
    """Name a kind of block in words, from its symbol in a pattern."""
    if symbol.startswith("("):
        return " and ".join(map(describe_symbol, symbol.strip("()").split("&"))) + " in parallel"
    kind = LETTERS.get(symbol)
    return kind.describe() if kind else symbol.strip("{}").replace("_", " ")
