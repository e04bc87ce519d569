"""Arguments as they were given, with defaults, and lines of a configuration that they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amfm.pretrain.foreign_states.megatron_arguments.table import read_table

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
