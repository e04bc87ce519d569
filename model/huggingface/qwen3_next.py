"""The transformers class `qwen3_next` (Gated DeltaNet, attention, experts): which models fit it, and its config.json.

Read from transformers 5.24 (`configuration_qwen3_next.py`, `modeling_qwen3_next.py`). Every layer is a mixer and a
feed-forward, each after a norm. Attention and shared expert have gates; for a model of ours without them, a sigmoid of zero
is one half, so that zero weights for the gate and twice ours for the matrix after it are the same function
(`qwen3_next_weights.py`).

The transformers class `qwen3_5_moe`, of which only the text model, `qwen3_5_moe_text`, is meant.

Read from transformers 5.24 (`configuration_qwen3_5_moe.py`, `modeling_qwen3_5_moe.py`). The same function as `qwen3_next`, with
an expert block in every layer; the projections of Gated DeltaNet are stored otherwise.

The transformers class `qwen3_5_text`: the dense text models of Qwen3.5, `qwen3_5_moe` with feed-forwards in place of experts.

Read from transformers 5.24 (`configuration_qwen3_5.py`, `modeling_qwen3_5.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.depths import QWEN3_NEXT_DEPTH, count_depths, depth_fields
from amfm.model.huggingface.entries import WeightEntry, WeightMap
from amfm.model.huggingface.fields import (
    GATED,
    NORMED_ROTARY,
    Wanted,
    flat_rope_fields,
    read_sizes,
    require_fields,
    rope_from_parameters,
    rope_parameters,
    unfit_expert_sizes,
    unfit_multipliers,
    unfit_settings,
    unfit_softmax_scale,
)
from amfm.model.huggingface.hf_class import HfTarget
from amfm.model.huggingface.qwen3_next_weights import RowsEntry, delta_options, qwen3_next_map, scan_entries
from amfm.model.huggingface.refusals import (
    IGNORED_ARGUMENTS,
    OUR_CONVERTER,
    Refusal,
    needs_byte_level,
    packed_rows,
    refused_tokenizer,
)

LAYER_TYPES = {"G": "linear_attention", "*": "full_attention"}
# What a mixture of the class must be.
EXPERTS: Wanted = {
    "activation": ("swiglu", "experts are gated"),
    "router": ("softmax", "a softmax scores experts"),
    "routed_scaling": (1.0, "there is no such factor"),
    "num_router_groups": (1, "experts are not grouped"),
    "expert_bias": (False, "the router has no bias"),
    "latent_size": (None, "experts read the full width"),
}
LETTERS = {name: letter for letter, name in LAYER_TYPES.items()}


def unfit_for_qwen3_next(config: ModelConfig) -> list[str]:
    """List every choice that the class cannot hold, as value, rule and fix."""
    letters = config.letters
    reasons = _unfit_pairs(letters) + unfit_multipliers(config, "qwen3_next")
    if "G" in letters:
        reasons += _unfit_delta(config)
    if "*" in letters and config.attention is not None:
        reasons += _unfit_attention(config.attention)
    if "E" in letters and config.moe is not None:
        reasons += unfit_settings("model.moe", config.moe, "qwen3_next", EXPERTS)
        reasons += unfit_expert_sizes(config, config.moe)
    if "-" in letters:
        reasons += unfit_settings("model.feed_forward", config.feed_forward, "qwen3_next", GATED)
    return reasons


def _unfit_pairs(letters: tuple[str, ...]) -> list[str]:
    mixers, seconds = letters[0::2], letters[1::2]
    is_paired = len(mixers) == len(seconds) and set(mixers) <= set("G*") and set(seconds) <= set("E-")
    if is_paired:
        return []
    return [
        f"model.pattern={''.join(letters)}: layers of qwen3_next are pairs, G or * and then E or -; use such a pattern, or "
        "target own"
    ]


def _unfit_delta(config: ModelConfig) -> list[str]:
    options = delta_options(config)
    reasons = []
    if options.allow_negative_eigenvalues:
        reasons.append(
            "model.mixers.gated_deltanet.allow_negative_eigenvalues=true: beta of qwen3_next is below 1; use false, or "
            "target own"
        )
    if not options.conv_kernel:
        reasons.append(
            "model.mixers.gated_deltanet.conv_kernel=0: qwen3_next always convolves; use 2 to 4, or target own"
        )
    return reasons


def _unfit_attention(attention: AttentionConfig) -> list[str]:
    reasons = unfit_settings("model.attention", attention, "qwen3_next", NORMED_ROTARY)
    if attention.gate == "head":
        reasons.append(
            "model.attention.gate=head: qwen3_next gates every element of a head; use element, or target own"
        )
    return reasons + unfit_softmax_scale(attention, "qwen3_next")


def qwen3_next_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the class's own."""
    letters = config.letters
    mixers, seconds = letters[0::2], letters[1::2]
    fields: dict[str, Any] = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": len(mixers),
        "layer_types": [LAYER_TYPES[letter] for letter in mixers],
        "mlp_only_layers": [layer for layer, letter in enumerate(seconds) if letter == "-"],
        "decoder_sparse_step": 1,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        # A model without attention still needs sizes that the class accepts.
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
    } | _attention_interval(mixers)
    if config.attention is not None:
        attention = config.attention
        rope = rope_parameters(attention) | {"partial_rotary_factor": attention.rope.fraction}
        fields |= {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
            "rope_parameters": rope,
        }
    fields |= flat_rope_fields(fields["rope_parameters"])
    if "G" in mixers:
        options = delta_options(config)
        fields |= {
            "linear_conv_kernel_dim": options.conv_kernel,
            "linear_key_head_dim": options.key_dim(),
            "linear_value_head_dim": options.value_dim(),
            "linear_num_key_heads": options.key_heads(),
            "linear_num_value_heads": options.num_heads,
        }
    if config.feed_forward is not None:
        fields["intermediate_size"] = config.feed_forward.hidden_size
    if config.moe is None:
        return fields | {"num_experts": 0} | depth_fields(config)
    moe = config.moe
    fields |= {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_hidden_size,
        "shared_expert_intermediate_size": moe.shared_expert_hidden_size or 1,
        "norm_topk_prob": moe.normalize_probabilities,
        # mlx-lm asks for it if no layer has it, too.
        "intermediate_size": fields.get("intermediate_size", moe.expert_hidden_size),
    }
    return fields | depth_fields(config)


def _attention_interval(mixers: Sequence[str]) -> dict[str, int]:
    """Find n where every n-th mixer is attention and no other one: llama.cpp and mlx-lm read it in place of the types."""
    for interval in range(1, len(mixers) + 2):
        if all((mixer == "*") == (layer % interval == 0) for layer, mixer in enumerate(mixers, start=1)):
            return {"full_attention_interval": interval}
    return {}


def model_config_from_qwen3_next(fields: Mapping[str, Any]) -> ModelConfig:
    """Build our configuration from config.json with the class's defaults filled in.

    Raises ValueError if the class uses something that our model does not have.
    """
    require_fields(fields, {"hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1})
    dense = set(fields.get("mlp_only_layers") or ())
    if not fields.get("num_experts"):
        dense = set(range(len(fields["layer_types"])))
    letters = [LETTERS[kind] + ("-" if layer in dense else "E") for layer, kind in enumerate(fields["layer_types"])]
    pattern = "".join(letters) + f"/{''.join(QWEN3_NEXT_DEPTH)}" * count_depths(fields)
    return ModelConfig.model_validate(
        {
            "pattern": pattern,
            **read_sizes(fields),
            "attention": _attention(fields) if "*" in pattern else None,
            "mixers": {"gated_deltanet": _delta(fields)} if "G" in pattern else {},
            "moe": _moe(fields) if "E" in pattern else None,
            "feed_forward": FeedForwardConfig(hidden_size=fields["intermediate_size"], activation="swiglu")
            if "-" in pattern
            else None,
        }
    )


def _attention(fields: Mapping[str, Any]) -> AttentionConfig:
    parameters = fields.get("rope_parameters") or {}
    fraction = float(parameters.get("partial_rotary_factor") or 1.0)
    return AttentionConfig(
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        qk_norm=True,
        gate="element",
        positions="rope",
        rope=rope_from_parameters(parameters).model_copy(update={"fraction": fraction}),
    )


def _delta(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "conv_kernel": fields["linear_conv_kernel_dim"],
        "num_heads": fields["linear_num_value_heads"],
        "num_key_heads": fields["linear_num_key_heads"],
        "head_dim": fields["linear_key_head_dim"],
        "value_head_dim": fields["linear_value_head_dim"],
    }


def _moe(fields: Mapping[str, Any]) -> MoeConfig:
    return MoeConfig(
        num_experts=fields["num_experts"],
        top_k=fields["num_experts_per_tok"],
        expert_hidden_size=fields["moe_intermediate_size"],
        shared_expert_hidden_size=fields["shared_expert_intermediate_size"],
        shared_expert_gate=True,
        activation="swiglu",
        router="softmax",
        normalize_probabilities=fields.get("norm_topk_prob", True),
    )


REFUSED_HEAD_DIM = 32


def qwen3_next_refusals(config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject a model of the class."""
    rule = "takes every SentencePiece model for BPE with a space before each text, and cuts texts into other tokens"
    refusals = refused_tokenizer(rule, tokenizer_kind)
    gguf = f"give it that, or {OUR_CONVERTER}"
    refusals += [
        Refusal("llama.cpp", f"its converter ends with an AssertionError without the option --no-mtp; {gguf}", True),
        Refusal("vllm", "it runs qwen3_next only in bf16; give it dtype=bfloat16", True),
    ]
    mixers = [letter for letter in config.letters if letter in "G*"]
    interval = mixers.index("*") + 1 if "*" in mixers else None
    if interval is not None and any(
        (place % interval == 0) != (letter == "*") for place, letter in enumerate(mixers, 1)
    ):
        rule = "it places attention by an interval and ends on missing keys; make it every n-th mixer for mlx-lm"
        refusals.append(Refusal("mlx-lm", rule))
    sizes = []
    if "*" in config.letters and config.attention is not None:
        sizes.append(("model.attention.head_dim", config.attention.head_dim))
    if "G" in config.letters:
        sizes.append(("model.mixers.gated_deltanet.head_dim", delta_options(config).key_dim()))
    for name, size in sizes:
        if size == REFUSED_HEAD_DIM:
            rule = (
                f'{name}={size} ends with "Unexpected head dim size, {size}"; 64 is known to work in attention, 128 in '
                "gated_deltanet"
            )
            refusals.append(Refusal("vllm", rule))
    return refusals


def _unfit_depths(config: ModelConfig) -> list[str]:
    if config.parsed_pattern.depth_letters == QWEN3_NEXT_DEPTH and config.num_depth_modules == 1:
        return []
    return ["qwen3_next has one module of attention and experts; use /*E, or model.mtp.shared"]


def limits(config: ModelConfig) -> list[str]:
    """What the class does not do."""
    of_states = [packed_rows("Gated DeltaNet")] if "G" in config.letters else []
    return [*of_states, IGNORED_ARGUMENTS]


CLASS = HfTarget(
    name="qwen3_next",
    model_type="qwen3_next",
    class_name="Qwen3NextForCausalLM",
    unfit=unfit_for_qwen3_next,
    fields=qwen3_next_fields,
    read=model_config_from_qwen3_next,
    weights=qwen3_next_map,
    unfit_depths=_unfit_depths,
    refusals=qwen3_next_refusals,
    limits=limits,
)


QWEN3_5_MOE_TYPE = "qwen3_5_moe_text"


def unfit_for_qwen3_5_moe(config: ModelConfig) -> list[str]:
    """Every choice that the class cannot hold: what qwen3_next cannot, a dense layer, and weights that do not sum to 1."""
    reasons = [reason.replace("qwen3_next", "qwen3_5_moe") for reason in unfit_for_qwen3_next(config)]
    if "-" in config.letters:
        reasons.append(
            f"model.pattern={config.pattern}: every layer of qwen3_5_moe has experts; use E in place of -, or target own"
        )
    elif config.moe is not None and not config.moe.normalize_probabilities:
        reasons.append(
            "model.moe.normalize_probabilities=false: qwen3_5_moe divides the chosen probabilities by their sum; use true, "
            "or target own"
        )
    return reasons


def qwen3_5_moe_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the text model's own."""
    unknown = ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob", "intermediate_size")
    fields = {name: value for name, value in qwen3_next_fields(config).items() if name not in unknown}
    return fields | {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": QWEN3_5_MOE_TYPE}


def _plain_delta_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    options, theirs = delta_options(config), f"{layer}linear_attn."
    keys, values = options.key_heads() * options.key_dim(), options.num_heads * options.value_dim()
    # q, k and v together; beta, decay and gate apart.
    names = tuple(f"{theirs}in_proj_{part}.weight" for part in ("qkv", "b", "a", "z"))
    sizes = (keys, keys, values, options.num_heads, options.num_heads, values)
    yield RowsEntry(f"{ours}in_proj.weight", names, sizes=sizes, takes=((0, 1, 2), (3,), (4,), (5,)))
    yield from scan_entries(ours, theirs)


def qwen3_5_moe_map(config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    return qwen3_next_map(config, _plain_delta_entries)


QWEN3_5_MOE_CLASS = HfTarget(
    name="qwen3_5_moe",
    model_type=QWEN3_5_MOE_TYPE,
    class_name="Qwen3_5MoeForCausalLM",
    unfit=unfit_for_qwen3_5_moe,
    fields=qwen3_5_moe_fields,
    read=model_config_from_qwen3_next,
    weights=qwen3_5_moe_map,
    unfit_tokenizer=partial(needs_byte_level, "qwen3_5_moe", "qwen3_next"),
    limits=limits,
)


TEXT_NAME = "qwen3_5_text"
# Of qwen3_next, and not of this class.
TEXT_UNKNOWN = ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob", "num_experts")


def unfit_for_qwen3_5_text(config: ModelConfig) -> list[str]:
    """Every choice that the class cannot hold: what qwen3_next cannot, and experts."""
    reasons = [reason.replace("qwen3_next", TEXT_NAME) for reason in unfit_for_qwen3_next(config)]
    if "E" in config.letters:
        rule = f"layers of {TEXT_NAME} are dense; use - in place of E, target qwen3_5_moe or own"
        reasons.append(f"model.pattern={config.pattern}: {rule}")
    return reasons


def qwen3_5_text_fields(config: ModelConfig) -> dict[str, Any]:
    """Build the fields of config.json that are the text model's own."""
    fields = {name: value for name, value in qwen3_next_fields(config).items() if name not in TEXT_UNKNOWN}
    return fields | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": TEXT_NAME}


QWEN3_5_CLASS = replace(
    QWEN3_5_MOE_CLASS,
    name="qwen3_5_text",
    model_type=TEXT_NAME,
    class_name="Qwen3_5ForCausalLM",
    unfit=unfit_for_qwen3_5_text,
    fields=qwen3_5_text_fields,
    unfit_tokenizer=partial(needs_byte_level, TEXT_NAME, "qwen3_next"),
)
