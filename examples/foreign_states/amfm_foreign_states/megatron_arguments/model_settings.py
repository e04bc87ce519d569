"""Our model section as the arguments of Megatron-LM describe it: pattern, attention, Mamba2, feed-forwards, experts, heads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from amfm_foreign_states.megatron_arguments.table import Arguments, Line, approximated, line

PATTERN = ("hybrid_layer_pattern", "num_layers", "moe_layer_freq", "linear_attention_freq", "window_attn_skip_freq")
LISTED = re.compile(r"[\[\]()+*,\s\d]+")
MAX_LAYERS = 4096
SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}
VOCABULARIES = {"GPT2BPETokenizer": 50257, "GPTSentencePieceTokenizer": 32000, "Llama2Tokenizer": 32000}


def model_lines(given: Arguments) -> Iterator[Line]:
    """All of the model but what the table's `=` rows say."""
    text, notes = read_pattern(given)
    yield Line("model.pattern", text, PATTERN, "; ".join(notes), is_approximate=bool(notes))
    letters = set(text.replace("|", "").replace("/", ""))
    yield from vocabulary_lines(given)
    # Of configurations that name the opposite.
    tied = given.get("share_embeddings_and_output_weights")
    untied = given["untie_embeddings_and_output_weights"] if tied is None else not tied
    names = ("untie_embeddings_and_output_weights", "share_embeddings_and_output_weights")
    yield line("model.tie_embeddings", not untied, *names)
    yield norm_line(given, letters)
    if "*" in letters:
        yield from attention_lines(given)
    if "+" in letters:
        yield from latent_lines(given)
    if "W" in letters:
        yield from window_lines(given)
    if "M" in letters:
        heads = given["mamba_num_heads"] or 2 * given.number("hidden_size") // given.number("mamba_head_dim")
        yield line("model.mamba.num_heads", heads, "mamba_num_heads")
        yield line("model.mamba.keep_states", not given["use_mamba_mem_eff_path"], "use_mamba_mem_eff_path")
    if "-" in letters:
        yield line("model.feed_forward.hidden_size", feed_forward_size(given), "ffn_hidden_size", "swiglu")
        yield activation_line(given, "feed_forward")
        yield line("model.feed_forward.bias", bool(given["add_bias_linear"]), "add_bias_linear")
    if "E" in letters:
        yield from expert_lines(given)
    if not given.is_record and ("M" in letters or given["moe_latent_size"]):
        yield line("model.megatron_init", True, "init_method_std")


def read_pattern(given: Arguments) -> tuple[str, list[str]]:
    """The pattern, and what it only approximates."""
    notes: list[str] = []
    text = given["hybrid_layer_pattern"]
    depths = given["mtp_num_layers"] or 0
    if text is None:
        text = gpt_pattern(given)
        text += depths * ("/" + text.replace("|", "")[-2:])
    elif depths and given["mtp_hybrid_override_pattern"] and "/" not in text:
        text += depths * f"/{given['mtp_hybrid_override_pattern']}"
    if given["hybrid_layer_pattern"] is None and (given["hybrid_attention_ratio"] or given["hybrid_mlp_ratio"]):
        raise ValueError(
            f"{given.where} has ratios of layers and no pattern; give the pattern that its log prints (hybrid_layer_pattern)"
        )
    if not isinstance(text, str):
        raise ValueError(f"{given.where}: hybrid_layer_pattern={text!r:.80} is not a text of letters")  # noqa: TRY004
    if given["multi_latent_attention"]:
        text = text.replace("*", "+")
    if "D" in text:
        plain = "+" if given["multi_latent_attention"] or "+" in text else "*"
        if plain in text:
            notes.append(f"all attention gets the indexer of D, there {plain} has none")
        text = text.replace("D", plain)
    return text, notes


def gpt_pattern(given: Arguments) -> str:
    """The layers of a GPT model, each a mixer and a feed-forward."""
    count = given["num_layers"]
    if not isinstance(count, int) or not 0 < count <= MAX_LAYERS:
        raise ValueError(
            f"{given.where} has neither hybrid_layer_pattern nor num_layers, or num_layers={count!r}; it must name the layers"
        )
    experts = spread(given["moe_layer_freq"], count, every=True) if given["num_experts"] else [0] * count
    linear = spread(given["linear_attention_freq"], count, every=False) if is_linear(given) else [0] * count
    full = spread(given["window_attn_skip_freq"], count, every=False) if given["window_size"] else [0] * count
    window = [1 - each for each in full] if given["window_size"] and not given["window_attn_skip_freq"] else full
    mixers = ["G" if is_mixed else "W" if is_near else "*" for is_mixed, is_near in zip(linear, window)]
    return "".join(mixer + ("E" if is_routed else "-") for mixer, is_routed in zip(mixers, experts))


def is_linear(given: Arguments) -> bool:
    """Whether some layers have Gated DeltaNet instead of attention."""
    return given["experimental_attention_variant"] in ("gated_delta_net", "gdn")


def spread(freq: Any, count: int, *, every: bool) -> list[int]:
    """Which layers are of a kind, 0 or 1 for each: of a frequency (`every`: each N-th from the first, else all but each N-th), or listed."""
    if isinstance(freq, str):
        freq = parse_list(freq)
    if isinstance(freq, list | tuple):
        if len(freq) != count or set(freq) - {0, 1}:
            raise ValueError(f"a list of layers has {len(freq)} numbers {freq!r:.60}, {count} of 0 and 1 are needed")
        return [int(each) for each in freq]
    number = freq if isinstance(freq, int) and freq > 0 else 1
    if every:
        return [int(index % number == 0) for index in range(count)]
    return [int((index + 1) % number != 0) for index in range(count)]


def parse_list(text: str) -> Any:
    """A number, or a list written as `[0]*2+[1]*3` or `([0,1])*4`; nothing is run. Raises ValueError for other texts."""
    if not LISTED.fullmatch(text) or len(text) > 1000:
        raise ValueError(f"a list of layers is written as [0]*2+[1]*3, not {text!r:.80}")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"a list of layers is written as [0]*2+[1]*3, not {text!r:.80}") from error


def _value(node: ast.expr) -> Any:
    """The value of numbers, lists, sums and products, of so many members at most."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if not isinstance(node, ast.BinOp):
        raise SyntaxError("neither a number nor a list")  # noqa: TRY004
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add):
        found = left + right
    else:
        if isinstance(left, list) and isinstance(right, int) and right * len(left) > MAX_LAYERS:
            raise SyntaxError(f"more than {MAX_LAYERS} layers")
        found = left * right
    return found


def vocabulary_lines(given: Arguments) -> Iterator[Line]:
    """The padded size of the vocabulary."""
    padded = given["padded_vocab_size"]
    size = given["vocab_size"]
    if padded:
        yield line("model.vocab_size", padded, "padded_vocab_size")
        return
    unit = given.number("make_vocab_size_divisible_by") * given.number("tensor_model_parallel_size")
    if size and given["should_pad_vocab"] is False:
        yield line("model.vocab_size", size, "vocab_size")
    elif size:
        yield line("model.vocab_size", -(-size // unit) * unit, "vocab_size", "make_vocab_size_divisible_by")
    elif not given.is_record:
        guess = VOCABULARIES.get(str(given["tokenizer_type"]), 131072)
        note = "the tokenizer's size is not there: write its padded number"
        yield approximated("model.vocab_size", -(-guess // unit) * unit, note, "padded_vocab_size")


def head_size(given: Arguments) -> int:
    """Channels per head of attention."""
    return int(given["kv_channels"] or given.number("hidden_size") // given.number("num_attention_heads"))


def key_heads(given: Arguments) -> int:
    """Heads of keys and values."""
    groups = given["num_query_groups"]
    grouped = given["group_query_attention"]
    if grouped is False or (grouped is None and given.is_flags and not given.is_record):
        groups = None
    return int(groups or given.number("num_attention_heads"))


def attention_bias(given: Arguments) -> bool | str:
    """Biases of attention: of all four matrices, of queries, keys and values, or none."""
    return bool(given["add_bias_linear"]) or ("qkv" if given["add_qkv_bias"] else False)


def attention_lines(given: Arguments) -> Iterator[Line]:
    """Of `*`."""
    yield line(
        "model.attention.num_kv_heads",
        key_heads(given),
        "num_query_groups",
        "group_query_attention",
        "num_attention_heads",
    )
    yield line("model.attention.head_dim", head_size(given), "kv_channels", "num_attention_heads", "hidden_size")
    is_rotary = given["position_embedding_type"] in ("rope", "yarn")
    yield position_line(given, "model.attention.positions", "rope" if is_rotary else "none")
    yield line("model.attention.bias", attention_bias(given), "add_bias_linear", "add_qkv_bias")
    yield line("model.attention.gate", "element" if given["attention_output_gate"] else "none", "attention_output_gate")
    yield line("model.attention.sinks", given["softmax_type"] == "learnable", "softmax_type")
    if is_rotary:
        yield from rotary_lines(given)
    if given["dsa_indexer_topk"]:
        yield from indexer_lines(given, "model.attention")


def position_line(given: Arguments, setting: str, value: str) -> Line:
    """Positions; those that are not there become none."""
    kind = given["position_embedding_type"]
    if kind in ("none", "rope", "yarn"):
        return line(setting, value, "position_embedding_type")
    return approximated(setting, value, f"position_embedding_type={kind} is not there", "position_embedding_type")


def rotary_lines(given: Arguments) -> Iterator[Line]:
    """Base and stretch of rotary positions."""
    if given["use_rope_scaling"]:
        names = ("use_rope_scaling", "rope_scaling_factor")
        yield line("model.attention.rope.scaling", "llama3", *names)
        yield line("model.attention.rope.llama3.factor", given["rope_scaling_factor"], *names)
        yield line("model.attention.rope.llama3.original_length", 8192, *names)
    elif given["position_embedding_type"] != "yarn":
        yield line("model.attention.rope.scaling", "none", "use_rope_scaling")
    else:
        rope = "model.attention.rope.yarn_"
        yield line("model.attention.rope.scaling", "yarn", "position_embedding_type")
        yield line(
            f"{rope}factor",
            given["yarn_rotary_scaling_factor"] or given["rotary_scaling_factor"],
            "rotary_scaling_factor",
        )
        length = given["yarn_original_max_position_embeddings"] or given["original_max_position_embeddings"]
        yield line(f"{rope}original_length", length, "yarn_original_max_position_embeddings")
        yield line(f"{rope}beta_fast", given["yarn_beta_fast"] or given["beta_fast"], "yarn_beta_fast")
        yield line(f"{rope}beta_slow", given["yarn_beta_slow"] or given["beta_slow"], "yarn_beta_slow")
        yield line(f"{rope}truncate", given["yarn_correction_range_round_to_int"], "yarn_correction_range_round_to_int")


def indexer_lines(given: Arguments, section: str) -> Iterator[Line]:
    """Of DeepSeek sparse attention."""
    for ours, theirs in (
        ("top_k", "topk"),
        ("num_heads", "n_heads"),
        ("head_dim", "head_dim"),
        ("loss_weight", "loss_coeff"),
    ):
        if given[f"dsa_indexer_{theirs}"]:
            yield line(f"{section}.indexer.{ours}", given[f"dsa_indexer_{theirs}"], f"dsa_indexer_{theirs}")
    stage = "sparse" if given["dsa_indexer_use_sparse_loss"] else "warm_up"
    yield line(f"{section}.indexer.stage", stage, "dsa_indexer_use_sparse_loss")


def latent_lines(given: Arguments) -> Iterator[Line]:
    """Of `+`, multi-head latent attention."""
    mla = "model.mixers.mla"
    yield line(f"{mla}.num_heads", given.number("num_attention_heads"), "num_attention_heads")
    is_rotary = (
        given["position_embedding_type"] in ("rope", "yarn", "learned_absolute") or given["rope_type"] is not None
    )
    yield line(f"{mla}.positions", "rope" if is_rotary else "none", "position_embedding_type")
    epsilon = (f"{mla}.latent_norm_epsilon", given["layernorm_epsilon"])
    if given["add_bias_linear"]:
        yield approximated(*epsilon, "the output of + has no bias here", "add_bias_linear")
    else:
        yield line(*epsilon, "layernorm_epsilon")
    factor = given["rotary_scaling_factor"]
    if is_rotary and given["rope_type"] in (None, "yarn") and factor and factor > 1:
        yield line(f"{mla}.yarn.factor", factor, "rotary_scaling_factor")
        length = given["original_max_position_embeddings"]
        yield line(f"{mla}.yarn.original_length", length, "original_max_position_embeddings")
        yield line(f"{mla}.yarn.beta_fast", given["beta_fast"], "beta_fast")
        yield line(f"{mla}.yarn.beta_slow", given["beta_slow"], "beta_slow")
        if given["mscale_all_dim"]:
            yield line(f"{mla}.yarn.mscale", given["mscale_all_dim"], "mscale", "mscale_all_dim")
    if given["dsa_indexer_topk"]:
        yield from indexer_lines(given, mla)


def window_lines(given: Arguments) -> Iterator[Line]:
    """Of `W`: their window has tokens on each side, and not the token itself."""
    size = given["window_size"]
    size = parse_list(size) if isinstance(size, str) else size
    window = "model.mixers.window"
    yield line(f"{window}.window", int(size[0]) + 1, "window_size")
    yield line(f"{window}.num_heads", given.number("num_attention_heads"), "num_attention_heads")
    yield line(f"{window}.num_kv_heads", key_heads(given), "num_query_groups")
    yield line(f"{window}.head_dim", head_size(given), "kv_channels")
    is_rotary = given["position_embedding_type"] in ("rope", "yarn")
    yield line(f"{window}.positions", "rope" if is_rotary else "none", "position_embedding_type")
    if is_rotary:
        yield line(f"{window}.rope_theta", given["rotary_base"], "rotary_base")
    yield line(f"{window}.qk_norm", given["qk_layernorm"], "qk_layernorm")
    yield line(f"{window}.bias", attention_bias(given), "add_bias_linear", "add_qkv_bias")
    yield line(f"{window}.sinks", given["softmax_type"] == "learnable", "softmax_type")


def norm_line(given: Arguments, letters: set[str]) -> Line:
    """Norms of the residual stream; those inside of mixers are RMSNorms here, there of the same kind but for Mamba2's."""
    kind, names = given["normalization"], ("normalization",)
    if kind == "RMSNorm":
        return line("model.norm", "rmsnorm", *names)
    if kind != "LayerNorm":
        return approximated("model.norm", "rmsnorm", f"normalization={kind} is not there", *names)
    if letters & set("G+") or given["qk_layernorm"]:
        return approximated("model.norm", "layernorm", "norms inside of mixers are RMSNorms here", *names)
    return line("model.norm", "layernorm", *names)


def feed_forward_size(given: Arguments) -> int:
    """Inner width, or the default of it."""
    width = given.number("hidden_size")
    usual = int(8 * width / 3 / 64) * 64 if given["swiglu"] else 4 * width
    return int(given["ffn_hidden_size"] or usual)


def activation_line(given: Arguments, section: str) -> Line:
    """The activation. GELU is tanh's form where a fused kernel adds biases, in feed-forwards, and else exact."""
    setting, names = f"model.{section}.activation", ("swiglu", "squared_relu", "quick_geglu", "activation_func")
    gated, chosen = given["gated_linear_unit"], str(given["activation_func"] or "")
    if given["quick_geglu"] and given["glu_linear_offset"] == 1.0:
        return line(setting, "swiglu_oai", *names, "glu_linear_offset")
    if given["swiglu"] or (gated and chosen.endswith("silu")):
        return line(setting, "swiglu", *names)
    if given["squared_relu"] or chosen.endswith("squared_relu"):
        return line(setting, "squared_relu", *names)
    if given["quick_geglu"]:
        note = "quick_geglu without glu_linear_offset=1 is not there"
        return approximated(setting, "swiglu_oai", note, *names, "glu_linear_offset")
    if chosen and not chosen.endswith("gelu"):
        return approximated(setting, "gelu", f"activation_func={chosen} is not there", *names)
    fused = given["bias_gelu_fusion"] if given.is_flags else given.get("bias_activation_fusion")
    is_fused = fused and section == "feed_forward"
    if gated and section == "moe":
        return approximated(setting, "swiglu", "GEGLU of experts is not there", *names, "gated_linear_unit")
    if gated:
        return line(setting, "geglu" if is_fused else "geglu_erf", *names, "gated_linear_unit", "bias_gelu_fusion")
    # The program leaves the fused kernel out where there are no biases.
    has_tanh = is_fused and given["add_bias_linear"]
    return line(setting, "gelu_tanh" if has_tanh else "gelu", *names, "bias_gelu_fusion", "add_bias_linear")


def expert_lines(given: Arguments) -> Iterator[Line]:
    """Of `E`."""
    moe = "model.moe"
    width = given["moe_ffn_hidden_size"] or feed_forward_size(given)
    yield line(f"{moe}.expert_hidden_size", width, "moe_ffn_hidden_size", "ffn_hidden_size")
    yield activation_line(given, "moe")
    yield line(f"{moe}.bias", bool(given["add_bias_linear"]), "add_bias_linear")
    score = given["moe_router_score_function"]
    yield line(f"{moe}.router", SCORES.get(score, score), "moe_router_score_function")
    is_softmax = score == "softmax"
    normalized = given["moe_router_topk"] != 1 and not (is_softmax and given["moe_router_pre_softmax"])
    yield line(f"{moe}.normalize_probabilities", normalized, "moe_router_pre_softmax", "moe_router_score_function")
    groups = given["moe_router_group_topk"]
    if groups:
        yield line(f"{moe}.router_group_top_k", groups, "moe_router_group_topk")
        if groups != given["moe_router_num_groups"]:
            best = max(1, given.number("moe_router_topk") // groups)
            yield line(f"{moe}.group_score_top_k", best, "moe_router_group_topk", "moe_router_topk")
    yield from balance_lines(given)


def balance_lines(given: Arguments) -> Iterator[Line]:
    """Losses that balance experts; several types have a weight each."""
    moe, names = "model.moe", ("moe_router_load_balancing_type", "moe_aux_loss_coeff")
    kinds, weights = given[names[0]], given[names[1]]
    kinds = kinds if isinstance(kinds, list) else [kinds]
    weights = weights if isinstance(weights, list) else [weights] * len(kinds)
    found = dict(zip(kinds, weights))
    known = {"aux_loss": "auxiliary_loss_weight", "seq_aux_loss": "sequence_loss_weight"}
    other = [kind for kind in found if kind not in (*known, "none", None)]
    for kind, ours in known.items():
        weight = found.get(kind) or 0.0
        if kind == "aux_loss" and "global_aux_loss" in other:
            yield approximated(
                f"{moe}.{ours}", weight or found["global_aux_loss"], "global_aux_loss is not there", *names
            )
        elif kind == "aux_loss" and other:
            yield approximated(f"{moe}.{ours}", weight, f"{other[0]} is not there", *names)
        else:
            yield line(f"{moe}.{ours}", weight, *names)
