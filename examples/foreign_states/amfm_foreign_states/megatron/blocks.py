"""Where Megatron-Core has the tensors of our blocks: names in a layer, and the parts that it cuts them into.

One table for both directions; `read.py` reads by it, `write.py` writes by it (megatron-core 0.16.1, and the
hybrid depths of Megatron-LM's main branch of August 2026, `mtp.layers.D.mtp_model_layer.layers.J`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.key_mixer_options import MlaOptions, WindowOptions
from amfm.model.config.mixer_options import GatedDeltaNetOptions
from amfm.model.config.moe import BIAS_CHANNELS
from amfm.model.config.schema import ModelConfig

ATTENTION_NORMS = ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
FEED_FORWARD_NORMS = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
# Names of a block's norm: of its own, and of Transformer Engine's layer that fuses it with the matrix behind it. The bias of a
# LayerNorm ends in `bias` in place of `weight`.
NORMS = {
    "M": ("norm.weight", "mixer.in_proj.layer_norm_weight"),
    "*": ATTENTION_NORMS,
    "W": ATTENTION_NORMS,
    "+": ("input_layernorm.weight",),
    "G": ("input_layernorm.weight", "self_attention.in_proj.layer_norm_weight"),
    "-": FEED_FORWARD_NORMS,
    "E": FEED_FORWARD_NORMS,
}
ATTENTION = {
    "o_proj.weight": "self_attention.linear_proj.weight",
    "o_proj.bias": "self_attention.linear_proj.bias",
    "q_norm.weight": "self_attention.q_layernorm.weight",
    "k_norm.weight": "self_attention.k_layernorm.weight",
}
# Of tensors that have the same form: our name in a block, theirs in a layer.
PLAIN = {
    "M": {name: f"mixer.{name}" for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")},
    "*": ATTENTION,
    "W": {
        "in_proj.weight": "self_attention.linear_qkv.weight",
        "in_proj.bias": "self_attention.linear_qkv.bias",
        "out_proj.weight": "self_attention.linear_proj.weight",
        "out_proj.bias": "self_attention.linear_proj.bias",
        "q_norm.weight": "self_attention.q_layernorm.weight",
        "k_norm.weight": "self_attention.k_layernorm.weight",
    },
    "+": {
        "kv_down.weight": "self_attention.linear_kv_down_proj.weight",
        "kv_norm.weight": "self_attention.kv_layernorm.weight",
        "kv_up.weight": "self_attention.linear_kv_up_proj.weight",
        "q_down.weight": "self_attention.linear_q_down_proj.weight",
        "q_norm.weight": "self_attention.q_layernorm.weight",
        "q_proj.weight": "self_attention.linear_q_up_proj.weight",
        "out_proj.weight": "self_attention.linear_proj.weight",
    },
    "G": {
        "A_log": "self_attention.A_log",
        "dt_bias": "self_attention.dt_bias",
        "norm.weight": "self_attention.out_norm.weight",
        "out_proj.weight": "self_attention.out_proj.weight",
    },
    "-": {
        f"{ours}.{part}": f"mlp.{theirs}.{part}"
        for ours, theirs in (("up_proj", "linear_fc1"), ("down_proj", "linear_fc2"))
        for part in ("weight", "bias")
    },
    "E": {
        "router.weight": "mlp.router.weight",
        "router.bias": "mlp.router.bias",
        "expert_bias": "mlp.router.expert_bias",
        "shared.up_proj.weight": "mlp.shared_experts.linear_fc1.weight",
        "shared.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
        "shared_gate.weight": "mlp.shared_experts.gate_weight",
        "latent_down.weight": "mlp.fc1_latent_proj.weight",
        "latent_up.weight": "mlp.fc2_latent_proj.weight",
    },
}
# The second names of norms, of Transformer Engine's layers that fuse them with the matrix behind them.
FUSED_NORMS = {
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
}
# Of tensors that are cut into several: our name, theirs, and the parts in the order of our rows.
PARTS = {
    "M": {
        "in_proj.weight": ("mixer.in_proj.weight", ("z", "x", "B", "C", "dt")),
        "conv.weight": ("mixer.conv1d.weight", ("x", "B", "C")),
        "conv.bias": ("mixer.conv1d.bias", ("x", "B", "C")),
    },
    "G": {
        "in_proj.weight": ("self_attention.in_proj.weight", ("query", "key", "value", "beta", "alpha", "z")),
        "conv.weight": ("self_attention.conv1d.weight", ("query", "key", "value")),
    },
}
EXPERTS = {"experts.up": "linear_fc1.weight", "experts.down": "linear_fc2.weight", "down_bias": "linear_fc2.bias"}
# With biases, `experts.up` has them in a column behind its own, and `experts.down` rows of zeros.
UP_BIAS = "linear_fc1.bias"
# Tensors of MLA whose rows give rotary channels.
ROTARY = ("q_proj.weight", "kv_down.weight")
FUSED = "self_attention.linear_qkv"
# Of a depth of prediction: our name, theirs.
DEPTH = {
    "embed_norm.weight": "enorm.weight",
    "stream_norm.weight": "hnorm.weight",
    "in_proj.weight": "eh_proj.weight",
    "norm.weight": "final_layernorm.weight",
}


def norm_names(names: Sequence[str], part: str) -> list[str]:
    """Names of a norm's weight, or of its bias."""
    return [f"{name.removesuffix('weight')}{part}" for name in names]


def depth_names(model: ModelConfig) -> dict[str, str]:
    """Of a depth of prediction: our name, theirs, with the biases of LayerNorms."""
    return {
        f"{ours.removesuffix('weight')}{part}": f"{theirs.removesuffix('weight')}{part}"
        for ours, theirs in DEPTH.items()
        for part in (model.norm_parts() if "norm" in ours else ("weight",))
    }


def extra_channels(model: ModelConfig, name: str) -> int:
    """How many columns of `experts.up`, or rows of `experts.down`, are there only for biases."""
    return BIAS_CHANNELS if name.startswith("experts.") and model.moe is not None and model.moe.bias else 0


def part_rows(model: ModelConfig, symbol: str) -> dict[str, int]:
    """Rows of the parts that a block's projection and convolution are cut into."""
    options = model.block_options(symbol)
    if isinstance(options, GatedDeltaNetOptions):
        heads, keys = options.num_heads, options.key_heads() * options.key_dim()
        values = heads * options.value_dim()
        return {"query": keys, "key": keys, "value": values, "beta": heads, "alpha": heads, "z": values}
    mamba = model.mamba
    assert mamba is not None, "the pattern has M, the configuration no mamba section"
    inner, group = mamba.inner_size(), mamba.num_groups * mamba.state_size
    return {"z": inner, "x": inner, "B": group, "C": group, "dt": mamba.num_heads}


def names_of(model: ModelConfig, symbol: str, name: str) -> tuple[str, ...]:
    """The names of a tensor of ours that has the same form there: one, or of a norm a second; none of other forms."""
    theirs = PLAIN[symbol].get(name)
    if theirs is None:
        return ()
    options = model.block_options(symbol)
    if not isinstance(options, MlaOptions):
        return (theirs,)
    if options.query_latent_size is None:
        theirs = theirs.replace("linear_q_up_proj", "linear_q_proj")
    return (theirs, FUSED_NORMS[theirs]) if theirs in FUSED_NORMS else (theirs,)


def row_order(model: ModelConfig, symbol: str, name: str) -> list[int] | None:
    """Where the rows of a group of ours are in the same group of theirs; None where they are in the same places.

    MLA rotates channels next to each other there, and here a channel of the first half with one of the second. A group is a
    head of queries, or the whole of what latents and the rotary key come from. Windows have queries, keys and values below
    each other here; there each head of keys has its own queries, key and value below each other.
    """
    options = model.block_options(symbol)
    if isinstance(options, MlaOptions) and options.positions == "rope" and name in ROTARY:
        first = options.nope_head_dim if name == "q_proj.weight" else options.latent_size
        pairs = range(first, first + options.rope_head_dim)
        return [*range(first), *pairs[0::2], *pairs[1::2]]
    if isinstance(options, WindowOptions) and name.startswith("in_proj."):
        size, heads = options.head_dim, options.num_kv_heads or options.num_heads
        shared = options.num_heads // heads * size
        group, parts = shared + 2 * size, ((0, shared), (shared, size), (shared + size, size))
        return [head * group + begin + row for begin, rows in parts for head in range(heads) for row in range(rows)]
    return None


def fused_rows(model: ModelConfig, symbol: str) -> dict[str, int]:
    """Rows of what `linear_qkv` is made of, by our layers and in its order, a gate behind the queries; none of other blocks."""
    attention = model.block_options(symbol)
    if not isinstance(attention, AttentionConfig):
        return {}
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    gate = {"g_proj": queries} if attention.gate != "none" else {}
    return {"q_proj": queries, **gate, "k_proj": keys, "v_proj": keys}


def key_heads(model: ModelConfig) -> int:
    """Heads of keys of `*`, whose groups `linear_qkv` has one after the other."""
    assert model.attention is not None, "the pattern has *, the configuration no attention section"
    return model.attention.num_kv_heads


def layers(model: ModelConfig, *, is_pairs: bool) -> Iterator[tuple[str, str, str, int | None]]:
    """Iterate over our blocks: our prefix, their symbol, the prefix of Megatron-Core's layer, and its place of a stack.

    is_pairs: a layer is two blocks, attention and what follows, as GPTModel has them. Depths are not stacked.
    """
    for index, symbol in enumerate(model.letters):
        layer = index // 2 if is_pairs else index
        yield f"blocks.{index}.", symbol, f"decoder.layers.{layer}.", layer
    for depth in range(model.num_depth_modules):
        for index, symbol in enumerate(model.parsed_pattern.depth_letters):
            inner = "transformer_layer." if is_pairs else f"mtp_model_layer.layers.{index}."
            yield f"mtp.{depth}.blocks.{index}.", symbol, f"mtp.layers.{depth}.{inner}", None


def check_fits(model: ModelConfig, where: object) -> None:
    """Raise ValueError for blocks that Megatron-Core does not have in this form."""
    symbols = set(model.letters + model.parsed_pattern.depth_letters)
    unknown = sorted(symbols - set(NORMS))
    used = {symbol: model.block_options(symbol) for symbol in sorted(symbols - set(unknown))}
    gated = used.get("G")
    refused = {
        f"model.pattern={model.pattern} has blocks {', '.join(unknown)}; {', '.join(NORMS)} move": bool(unknown),
        "a gate of attention (gate) but `element` of *": any(
            each.gate not in ("none", "element" if isinstance(each, AttentionConfig) else "none")
            for each in used.values()
            if isinstance(each, AttentionConfig | WindowOptions | MlaOptions)
        ),
        "biases next to a gate of attention": any(
            getattr(each, "bias", False) and getattr(each, "gate", "none") != "none" for each in used.values()
        ),
        f"model.{model.stream_name}": model.stream is not None,
        "norms after blocks": model.norm_placement != "before",
        "norms over all heads (qk_norm: wide)": any(getattr(each, "qk_norm", None) == "wide" for each in used.values()),
        "sinks": any(getattr(each, "sinks", False) for each in used.values()),
        "an indexer": any(getattr(each, "indexer", None) is not None for each in used.values()),
        "conv_kernel: 0 of gated_deltanet": isinstance(gated, GatedDeltaNetOptions) and not gated.conv_kernel,
        "factored matrices (linear_kind, shared_expert_linear_kind)": any(
            kind != "dense"
            for kind in (
                "dense" if model.feed_forward is None else model.feed_forward.linear_kind,
                "dense" if model.moe is None else model.moe.shared_expert_linear_kind,
            )
        ),
        "a factored head": model.head is not None,
    }
    found = [name for name, is_set in refused.items() if is_set]
    if found:
        raise ValueError(f"{where}: Megatron-Core has no place for {'; '.join(found)}; leave it out")
