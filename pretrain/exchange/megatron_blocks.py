"""Where Megatron-Core has the tensors of our blocks: names in a layer, and the parts that it cuts them into.

One table for both directions; `megatron.py` reads by it, `megatron_write.py` writes by it (megatron-core 0.16.1, and the
hybrid depths of Megatron-LM's main branch of August 2026, `mtp.layers.D.mtp_model_layer.layers.J`).
"""

from __future__ import annotations

from collections.abc import Iterator

from amfm.model.config.mixer_options import GatedDeltaNetOptions
from amfm.model.config.schema import ModelConfig

ATTENTION_NORMS = ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
FEED_FORWARD_NORMS = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
# Names of a block's norm: of its own, and of Transformer Engine's layer that fuses it with the matrix after it.
NORMS = {
    "M": ("norm.weight", "mixer.in_proj.layer_norm_weight"),
    "*": ATTENTION_NORMS,
    "G": ("input_layernorm.weight", "self_attention.in_proj.layer_norm_weight"),
    "-": FEED_FORWARD_NORMS,
    "E": FEED_FORWARD_NORMS,
}
# Of tensors that have the same form: our name in a block, theirs in a layer.
PLAIN = {
    "M": {name: f"mixer.{name}" for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")},
    "*": {
        "o_proj.weight": "self_attention.linear_proj.weight",
        "q_norm.weight": "self_attention.q_layernorm.weight",
        "k_norm.weight": "self_attention.k_layernorm.weight",
    },
    "G": {
        "A_log": "self_attention.A_log",
        "dt_bias": "self_attention.dt_bias",
        "norm.weight": "self_attention.out_norm.weight",
        "out_proj.weight": "self_attention.out_proj.weight",
    },
    "-": {"up_proj.weight": "mlp.linear_fc1.weight", "down_proj.weight": "mlp.linear_fc2.weight"},
    "E": {
        "router.weight": "mlp.router.weight",
        "expert_bias": "mlp.router.expert_bias",
        "shared.up_proj.weight": "mlp.shared_experts.linear_fc1.weight",
        "shared.down_proj.weight": "mlp.shared_experts.linear_fc2.weight",
        "shared_gate.weight": "mlp.shared_experts.gate_weight",
        "latent_down.weight": "mlp.fc1_latent_proj.weight",
        "latent_up.weight": "mlp.fc2_latent_proj.weight",
    },
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
EXPERTS = {"experts.up": "linear_fc1.weight", "experts.down": "linear_fc2.weight"}
FUSED = "self_attention.linear_qkv.weight"
# Of a depth of prediction: our name, theirs.
DEPTH = {
    "embed_norm.weight": "enorm.weight",
    "stream_norm.weight": "hnorm.weight",
    "in_proj.weight": "eh_proj.weight",
    "norm.weight": "final_layernorm.weight",
}


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


def fused_rows(model: ModelConfig) -> dict[str, int]:
    """Rows of what `linear_qkv` is made of, by our names and in its order; a gate stands after the queries."""
    attention = model.attention
    assert attention is not None, "the pattern has *, the configuration no attention section"
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    gate = {"g_proj.weight": queries} if attention.gate != "none" else {}
    return {"q_proj.weight": queries, **gate, "k_proj.weight": keys, "v_proj.weight": keys}


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
    unknown = sorted(set(model.letters + model.parsed_pattern.depth_letters) - set(NORMS))
    attention = model.attention
    gated = model.block_options("G") if "G" in model.letters else None
    refused = {
        f"model.pattern={model.pattern} has blocks {', '.join(unknown)}; M, *, G, - and E move": bool(unknown),
        "model.attention.gate=head": attention is not None and attention.gate not in ("none", "element"),
        "norms after blocks": model.norm_placement != "before",
        "norms over all heads (qk_norm: wide)": attention is not None and attention.qk_norm == "wide",
        "model.attention.sinks": attention is not None and attention.sinks,
        "model.attention.bias": attention is not None and bool(attention.bias),
        "model.moe.bias": model.moe is not None and model.moe.bias,
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
