"""The arguments of Megatron-LM that concern pretraining, and the settings that do the same: the rows of flags.txt.

The one place of these facts: `amfm import megatron-args` writes settings by it, `amfm import` of a checkpoint compares by
it, and docs/from_megatron.md is made of it.

Arguments as they were given, with defaults, and lines of a configuration that they become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

FILE = Path(__file__).with_name("flags.txt")
Effect = Literal["w", "t", "-"]
# Prefixes of flags that turn something off.
OFF = ("no_", "disable_")


@dataclass(frozen=True)
class Row:
    """Arguments that share everything. `default`: there; `kind`: `=`, `~`, `only V`, `always` or `none`; `users`: who would miss them."""

    section: str
    effect: Effect
    names: tuple[str, ...]
    default: Any
    settings: tuple[str, ...]
    kind: str
    users: str
    note: str

    @property
    def only(self) -> Any:
        """The value that means the same here, of kind `only V`."""
        return yaml.safe_load(self.kind.removeprefix("only "))

    def default_of(self, name: str) -> Any:
        """The default of one of the arguments: one for the row, or by name."""
        return self.default.get(name) if isinstance(self.default, dict) else self.default

    def is_equal(self, name: str, value: Any) -> bool:
        """Whether a value asks for nothing that is missing here: the one value, or what is the default or off there."""
        if self.kind.startswith("only "):
            return same(value, self.only)
        return self.kind != "none" or not value or same(value, self.default_of(name))


@dataclass(frozen=True)
class Table:
    """All rows by argument, and other spellings with the argument and value that they mean (None: the value given)."""

    rows: tuple[Row, ...]
    by_name: Mapping[str, Row]
    spellings: Mapping[str, tuple[str, Any]]

    def resolve(self, name: str, value: Any) -> tuple[str, Any]:
        """The argument and value that a spelling means, with `-` or `_`, or turned off by `no-`."""
        name = name.lstrip("-").replace("-", "_")
        if name in self.spellings:
            argument, fixed = self.spellings[name]
            return argument, value if fixed is None else fixed
        for prefix in OFF:
            short = name.removeprefix(prefix)
            if name not in self.by_name and short != name and short in self.by_name and value is True:
                return short, False
        return name, value

    def default(self, name: str) -> Any:
        """The default there; None if it has none, or the argument is not known."""
        row = self.by_name.get(name)
        return None if row is None else row.default_of(name)


@cache
def read_table() -> Table:
    """Read the file."""
    rows: list[Row] = []
    spellings: dict[str, tuple[str, Any]] = {}
    section = ""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("@ "):
            name, argument, *value = line[2:].split()
            spellings[name] = (argument, yaml.safe_load(value[0]) if value else None)
        elif line and not line.startswith("#"):
            effect, names, default, settings, kind, users, note = (part.strip() for part in line.split("|"))
            found = tuple(part.strip(",") for part in settings.split())
            rows.append(
                Row(section, effect, tuple(names.split()), yaml.safe_load(default), found, kind, users, note)  # type: ignore[arg-type]
            )
    return Table(tuple(rows), {name: row for row in rows for name in row.names}, spellings)


def same(left: Any, right: Any) -> bool:
    """Whether two values are one: numbers within rounding, others as they are."""
    if isinstance(left, bool) or isinstance(right, bool) or not _are_numbers(left, right):
        return bool(left == right)
    if left == right:
        return True
    return abs(left - right) <= 1e-9 * max(abs(left), abs(right))


def _are_numbers(*values: Any) -> bool:
    """Whether all are numbers."""
    return all(isinstance(value, int | float) for value in values)


# Arguments that are texts or lists; others that become settings are numbers and truths.
WORDS = """
hybrid_layer_pattern moe_layer_freq linear_attention_freq experimental_attention_variant window_size window_attn_skip_freq
position_embedding_type rope_type softmax_type mtp_hybrid_override_pattern moe_router_score_function activation_func
moe_router_load_balancing_type moe_aux_loss_coeff moe_token_drop_policy lr_decay_style lr_wsd_decay_style optimizer
weight_decay_incr_style muon_scale_mode muon_tp_mode fp8 fp8_recipe fp4 fp4_recipe data_parallel_sharding_strategy
recompute_granularity recompute_method recompute_modules cuda_graph_impl cuda_graph_modules cuda_graph_scope data_path
train_data_path split save load wandb_project wandb_exp_name tokenizer_model rampup_batch_size step_batch_size_schedule
iterations_to_skip normalization tokenizer_type vocab_file merge_file tiktoken_pattern
"""
TEXTS = frozenset(WORDS.split())


@dataclass(frozen=True)
class Line:
    """A setting and its value, and the arguments that it comes from; `note`: how it differs, where it is only approximate.

    `is_unset`: was not given, and has no default there: the default here.
    """

    setting: str
    value: Any
    names: tuple[str, ...]
    note: str = ""
    is_approximate: bool = False
    is_unset: bool = False


def line(setting: str, value: Any, *names: str) -> Line:
    """A line that means the same."""
    return Line(setting, value, names)


def approximated(setting: str, value: Any, note: str, *names: str) -> Line:
    """A line that means the nearest that is there."""
    return Line(setting, value, names, note, is_approximate=True)


@dataclass(frozen=True)
class Arguments:
    """What was given, by the table's names.

    `is_flags`: a command line, whose other arguments have the program's defaults; else a configuration of Megatron-Core's
    fields. `is_record`: of a run that was, so nothing is guessed.
    """

    where: str
    given: Mapping[str, Any]
    is_flags: bool = True
    is_record: bool = False

    def __getitem__(self, name: str) -> Any:
        """What was given, else the default of Megatron-LM, else None."""
        return self.given[name] if name in self.given else read_table().default(name)

    def get(self, name: str) -> Any:
        """What was given, else None."""
        return self.given.get(name)

    def number(self, name: str) -> int:
        """An integer that must be there. Raises ValueError if it is not."""
        value = self[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.where}: {name}={value!r} is not an integer of at least 1; give it")
        return value


def resolve(where: str, found: Mapping[str, Any], *, is_flags: bool = True, is_record: bool = False) -> Arguments:
    """Arguments by the table's names. Of two spellings the table's own stands, where it has a value."""
    table = read_table()
    given: dict[str, Any] = {}
    for name, value in found.items():
        argument, meant = table.resolve(name, value)
        is_own = name.lstrip("-").replace("-", "_") == argument
        # What was not turned on under another name means nothing.
        if is_own or (value not in (None, False) and given.get(argument) is None and found.get(argument) is None):
            given[argument] = meant
    for name, value in given.items():
        row = table.by_name.get(name)
        is_text = value is not None and not isinstance(value, bool | int | float)
        if is_text and row is not None and row.kind in ("=", "~") and name not in TEXTS:
            raise ValueError(
                f"{where}: {name}={value!r:.80} is not a number; if a shell variable holds it, write the number in"
            )
    return Arguments(where, given, is_flags, is_record)
