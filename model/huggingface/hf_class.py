"""What we know of a class of transformers: one value per class, in the file of its family, all of them in `classes.py`.

A class that is read has a model type, a reader of config.json and a weight map; one that is written too (`HfTarget`) also says
which models fit it and what its config.json holds. Adding one takes its file or its family's, its name here and its row in `classes.py`. This
file imports no torch, so that settings and the command line can name the classes.

A package adds a class to write by an entry point of the group `amfm.export_targets`, whose name is the target's and which names
an `HfTarget`. `auto` never chooses it, and what we read is read as before: installing a package changes no export of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, get_args

from amfm.model.config.schema import ModelConfig

if TYPE_CHECKING:
    from amfm.model.huggingface.entries import WeightMap
    from amfm.model.huggingface.refusals import Refusal

ENTRY_POINTS = "amfm.export_targets"
OurTarget = Literal[
    "nemotron_h",
    "granitemoehybrid",
    "qwen3_next",
    "qwen3_5_moe",
    "kimi_linear",
    "deepseek_v3",
    "deepseek_v32",
    "lfm2",
    "lfm2_moe",
    "gpt_oss",
    "falcon_h1",
    "own",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "glm4_moe",
    "hy_v3",
    "olmoe",
    "minimax_m2",
    "olmo2",
    "olmo3",
    "bamba",
    "gemma3_text",
    "qwen3_5_text",
    "deepseek_v2",
    "glm_moe_dsa",
    "olmo_hybrid",
    "bailing_hybrid",
]
OURS: tuple[str, ...] = get_args(OurTarget)
# Of packages only by name: their code imports this file.
PACKAGED = tuple(sorted({entry.name for entry in entry_points(group=ENTRY_POINTS)} - {*OURS}))
if TYPE_CHECKING:
    Target = OurTarget
else:
    Target = Literal[(*OURS, *PACKAGED)]
# Classes that are read.
Source = Target


def nothing_skipped(name: str, config: ModelConfig) -> bool:
    """Every tensor of a checkpoint is read."""
    return False


def any_tokenizer(kind: str) -> list[str]:
    """AutoTokenizer reads every tokenizer of ours in a folder of the class."""
    return []


def no_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """No program is known to reject the class."""
    return []


def nothing_said(config: ModelConfig) -> list[str]:
    """Nothing to say in the model card."""
    return []


@dataclass(frozen=True, kw_only=True)
class HfClass:
    """A class of transformers that we read.

    read: our configuration from config.json with the class's defaults filled in; raises ValueError for what our model has not.
    weights: the map between our names and theirs. is_skipped: whether a tensor, by its name there, is not read.
    """

    name: Source
    model_type: str
    read: Callable[[Mapping[str, Any]], ModelConfig]
    weights: Callable[[ModelConfig], WeightMap]
    is_skipped: Callable[[str, ModelConfig], bool] = nothing_skipped


@dataclass(frozen=True, kw_only=True)
class HfTarget(HfClass):
    """A class of transformers that we write, too.

    unfit: every choice that the class cannot hold, as value, rule and fix. fields: what config.json holds besides
    the fields that all classes share. length_names: further fields for the tokens per sequence. unfit_depths: what else
    keeps MTP layers out; None: the class has no place for them. unfit_tokenizer: why AutoTokenizer would not
    give the ids of a kind of tokenizer (sentencepiece or huggingface). rejections: programs that reject a model of the
    class, by configuration and kind of tokenizer.
    holds: options of ours, by name, that few classes have and this one does (`fields.RARE_OPTIONS`). warnings: sentences
    for the model card. limits: what users of transformers expect and the class does not do. ships_code: its modelling
    files are written next to the weights.
    """

    name: Target
    class_name: str
    unfit: Callable[[ModelConfig], list[str]]
    fields: Callable[[ModelConfig], dict[str, Any]]
    length_names: tuple[str, ...] = ()
    unfit_depths: Callable[[ModelConfig], list[str]] | None = None
    unfit_tokenizer: Callable[[str], list[str]] = any_tokenizer
    refusals: Callable[[ModelConfig, str], list[Refusal]] = no_refusals
    remarks: Callable[[ModelConfig], list[str]] = nothing_said
    limits: Callable[[ModelConfig], list[str]] = nothing_said
    holds: frozenset[str] = frozenset()
    ships_code: bool = False
