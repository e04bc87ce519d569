"""Classes of attention (or Mamba2) and feed-forwards, one row each: names and fixed choices in which transformers' 5.24 classes differ.

`fields.py` reads and writes config.json by a row and names its tensors; it knows no class by name. A class whose
layers are an attention (over all tokens or a window) and then a gated feed-forward or experts, each after a norm, is a row.

Tensors of such a class are exact both ways but for norms that are stored as an offset from 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from amfm.model.config.key_mixer_options import WindowOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.entries import WeightEntry, WeightMap, paired_map
from amfm.model.huggingface.gpt_oss import StackedEntry
from amfm.model.huggingface.granitemoehybrid import mamba_entries
from amfm.model.huggingface.qwen3_next_weights import GatedEntry, NormEntry, gated_experts
from amfm.model.shapes import block_shapes

# How config.json says which layers are windows: not at all, one number for all layers, or a list.
Windows = Literal["none", "all", "listed"]
# How it says which layers are sparse: not at all (all are, if there are experts), or by the field of this name.
Sparse = Literal["all", "mlp_only_layers", "first_k_dense_replace", "mlp_layer_types"]

Bias = bool | Literal["qkv"]
QkNorm = bool | Literal["wide"]


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """The shared expert of a class, which every layer with experts has.

    name: its field of config.json: how many experts wide it is where `counts`, else its width. place: its module.
    """

    name: str
    place: str
    counts: bool = True


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of a class.

    names: fields of config.json by our setting. fixed: settings that the class has no field for. sparse: how layers with experts
    are named. place: their module. matrices: gate, up and down of an expert. router, bias: their tensors below `place`.
    """

    names: Mapping[str, str]
    fixed: Mapping[str, Any]
    sparse: Sparse = "all"
    place: str = "mlp."
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: str = "gate.weight"
    bias: str | None = None
    shared: SharedExpert | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One class.

    qk_norm: ours, or the field of config.json that says whether heads are normed. bias: ours, or its field and what of ours true is there.
    has_head_dim: config.json has the size of a head. partial: a part of a head may be rotated, by `partial_rotary_factor`; a number:
    this part always. mamba: further layers have Mamba2; its field names those that have attention.
    window_switch: a field that is true if there are windows. experts: None: layers are dense. rejected: fields that must have
    this value. extra: further fields that config.json gets. depth_layers: layers after the last one predict further ahead, and
    are not read. byte_level_alone: AutoTokenizer reads every folder of it as byte-level BPE. norms: those of both blocks of a layer, `norm_placement` where they are.
    out_norms: those after both blocks, where `norm_placement` is `both`. has_offset_norms: norms are 1 + w. activation: its field, its name there, and ours.
    scale: a field whose power of -1/2 is the factor on scores. scales_embedding: embeddings are multiplied by the root of the width.
    rope_by_type: windows and attention have their own rotation. dense_place: the module of a dense feed-forward.
    """

    name: str
    class_name: str
    qk_norm: QkNorm | str = False
    bias: Bias | tuple[str, Bias] = False
    has_head_dim: bool = True
    partial: bool | float = False
    mamba: str | None = None
    windows: Windows = "none"
    rope_by_type: bool = False
    window_switch: str | None = None
    experts: Experts | None = None
    refused: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    depth_layers: bool = False
    byte_level_alone: bool = False
    norm_placement: Literal["before", "after", "both"] = "before"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    out_norms: tuple[str, str] | None = None
    has_offset_norms: bool = False
    final_norm: str = "norm"
    activation: tuple[str, str, Literal["swiglu", "geglu"]] = ("hidden_act", "silu", "swiglu")
    scale: str | None = None
    scales_embedding: bool = False
    dense_place: str = "mlp."


BIASES: tuple[str, bool] = ("attention_bias", True)
GATED = {"activation": "swiglu"}
SOFTMAX = GATED | {"router": "softmax"}
SIGMOID = GATED | {"router": "sigmoid", "expert_bias": True}
QWEN = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_hidden_size": "moe_intermediate_size",
    "normalize_probabilities": "norm_topk_prob",
}
MIXTRAL = {
    "num_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "expert_hidden_size": "intermediate_size",
}
MIXTRAL_PLACE = "block_sparse_moe."
MIXTRAL_MATRICES = ("w1", "w3", "w2")

LLAMA = Family(name="llama", class_name="LlamaForCausalLM", bias=BIASES, refused={"mlp_bias": False})
MISTRAL = Family(name="mistral", class_name="MistralForCausalLM", windows="all")
QWEN2 = Family(
    name="qwen2",
    class_name="Qwen2ForCausalLM",
    byte_level_alone=True,
    bias="qkv",
    windows="listed",
    window_switch="use_sliding_window",
)
QWEN3 = Family(
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    qk_norm=True,
    bias=BIASES,
    windows="listed",
    window_switch="use_sliding_window",
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    qk_norm=True,
    bias=BIASES,
    windows="all",
    window_switch="use_sliding_window",
    experts=Experts(
        names=QWEN | {"num_experts": "num_local_experts"},
        fixed=SOFTMAX,
        sparse="mlp_only_layers",
    ),
    refused={"decoder_sparse_step": 1},
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    bias=("qkv_bias", "qkv"),
    windows="listed",
    window_switch="use_sliding_window",
    experts=Experts(
        names=QWEN,
        fixed=SOFTMAX | {"shared_expert_gate": True},
        sparse="mlp_only_layers",
        shared=SharedExpert(name="shared_expert_intermediate_size", place="mlp.shared_expert.", counts=False),
    ),
    refused={"decoder_sparse_step": 1},
)
MIXTRAL_FAMILY = Family(
    name="mixtral",
    class_name="MixtralForCausalLM",
    windows="all",
    experts=Experts(names=MIXTRAL, fixed=SOFTMAX, place=MIXTRAL_PLACE, matrices=MIXTRAL_MATRICES),
    refused={"router_jitter_noise": 0.0},
)
GLM4_MOE = Family(
    name="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    qk_norm="use_qk_norm",
    bias=("attention_bias", "qkv"),
    partial=True,
    experts=Experts(
        names={
            "num_experts": "n_routed_experts",
            "top_k": "num_experts_per_tok",
            "expert_hidden_size": "moe_intermediate_size",
            "normalize_probabilities": "norm_topk_prob",
            "routed_scaling": "routed_scaling_factor",
            "num_router_groups": "n_group",
            "router_group_top_k": "topk_group",
        },
        fixed=SIGMOID,
        sparse="first_k_dense_replace",
        bias="gate.e_score_correction_bias",
        shared=SharedExpert(name="n_shared_experts", place="mlp.shared_experts."),
    ),
    extra={"num_nextn_predict_layers": 0},
    depth_layers=True,
)
HY_V3 = Family(
    name="hy_v3",
    class_name="HYV3ForCausalLM",
    qk_norm=True,
    bias=BIASES,
    experts=Experts(
        names={
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "expert_hidden_size": "moe_intermediate_size",
            "routed_scaling": "router_scaling_factor",
        },
        fixed=SIGMOID,
        sparse="mlp_layer_types",
        router="router.gate.weight",
        bias="expert_bias",
        shared=SharedExpert(name="num_shared_experts", place="mlp.shared_mlp."),
    ),
    refused={"mlp_bias": False},
    depth_layers=True,
)
OLMOE = Family(
    name="olmoe",
    class_name="OlmoeForCausalLM",
    qk_norm="wide",
    bias=BIASES,
    has_head_dim=False,
    experts=Experts(names=QWEN | {"expert_hidden_size": "intermediate_size"}, fixed=SOFTMAX),
    refused={"clip_qkv": None},
)
MINIMAX_M2 = Family(
    name="minimax_m2",
    class_name="MiniMaxM2ForCausalLM",
    qk_norm="wide",
    partial=True,
    experts=Experts(
        names=MIXTRAL,
        fixed=SIGMOID,
        place=MIXTRAL_PLACE,
        matrices=MIXTRAL_MATRICES,
        bias="e_score_correction_bias",
    ),
    refused={"router_jitter_noise": 0.0},
)
OLMO2 = Family(
    name="olmo2",
    class_name="Olmo2ForCausalLM",
    qk_norm="wide",
    bias=BIASES,
    has_head_dim=False,
    norm_placement="after",
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
OLMO3 = replace(OLMO2, name="olmo3", class_name="Olmo3ForCausalLM", windows="listed", rope_by_type=True)
BAMBA = Family(
    name="bamba",
    class_name="BambaForCausalLM",
    bias=BIASES,
    has_head_dim=False,
    # Whatever config.json says.
    partial=0.5,
    mamba="attn_layer_indices",
    norms=("input_layernorm", "pre_ff_layernorm"),
    final_norm="final_layernorm",
    dense_place="feed_forward.",
    refused={"mamba_proj_bias": False, "mlp_bias": False},
)
GEMMA3 = Family(
    name="gemma3_text",
    class_name="Gemma3ForCausalLM",
    qk_norm=True,
    bias=BIASES,
    windows="listed",
    rope_by_type=True,
    norm_placement="both",
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    out_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    has_offset_norms=True,
    activation=("hidden_activation", "gelu_pytorch_tanh", "geglu"),
    scale="query_pre_attn_scalar",
    scales_embedding=True,
    refused={
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    # The class asks for one without any windows, too.
    extra={"sliding_window": 4096},
)
# In this order `auto` tries them.
FAMILIES: tuple[Family, ...] = (
    LLAMA,
    QWEN3,
    QWEN2,
    MISTRAL,
    QWEN3_MOE,
    MIXTRAL_FAMILY,
    QWEN2_MOE,
    GLM4_MOE,
    HY_V3,
    OLMOE,
    MINIMAX_M2,
    OLMO2,
    OLMO3,
    BAMBA,
    GEMMA3,
)


def plain_map(family: Family, config: ModelConfig) -> WeightMap:
    """Build the weight map of a model that fits the class."""
    blocks = {
        "*": _attention_entries,
        "W": _window_entries,
        "M": mamba_entries,
        "-": lambda config, ours, layer: gated_entries(ours, layer + family.dense_place),
    }
    if family.experts is not None:
        blocks["E"] = partial(_expert_entries, family.experts)
    norm_entry = NormEntry if family.has_offset_norms else WeightEntry
    more = [] if family.out_norms is None else list(_out_norm_entries(family.out_norms, norm_entry, config))
    found = paired_map(config, blocks, norms=family.norms, final=family.final_norm, norm_entry=norm_entry, more=more)
    if not family.has_offset_norms:
        return found
    of_heads = (".mixer.q_norm.weight", ".mixer.k_norm.weight")
    entries = (
        NormEntry(entry.ours, entry.theirs) if entry.ours.endswith(of_heads) else entry for entry in found.entries
    )
    return replace(found, entries=tuple(entries))


def _out_norm_entries(
    names: tuple[str, str], norm_entry: type[WeightEntry], config: ModelConfig
) -> Iterator[WeightEntry]:
    """Norms after both blocks of each layer."""
    for index in range(len(config.letters)):
        theirs = f"model.layers.{index // 2}.{names[index % 2]}.weight"
        yield norm_entry(f"blocks.{index}.out_norm.weight", (theirs,))


def _attention_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    """Attention has the classes' names."""
    for name in block_shapes(config, "*"):
        yield WeightEntry(ours + name, (f"{layer}self_attn.{name}",))


def _window_entries(config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    options = config.block_options("W")
    assert isinstance(options, WindowOptions), f"W has {type(options).__name__}"
    heads, keys, size = options.num_heads, options.kv_heads(), options.head_dim
    for name in block_shapes(config, "W"):
        module, _, kind = name.partition(".")
        if module == "in_proj":
            names = tuple(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")
            yield StackedEntry(ours + name, names, sizes=(heads * size, keys * size, keys * size))
        else:
            yield WeightEntry(ours + name, (f"{layer}self_attn.{name.replace('out_proj', 'o_proj')}",))


def gated_entries(ours: str, theirs: str) -> Iterator[WeightEntry]:
    """Entries of a gated feed-forward."""
    yield GatedEntry(f"{ours}up_proj.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"))
    yield WeightEntry(f"{ours}down_proj.weight", (f"{theirs}down_proj.weight",))


def _expert_entries(experts: Experts, config: ModelConfig, ours: str, layer: str) -> Iterator[WeightEntry]:
    assert config.moe is not None, "the pattern has E, the configuration no moe section"
    theirs = layer + experts.place
    yield WeightEntry(f"{ours}router.weight", (theirs + experts.router,))
    if experts.bias is not None:
        yield WeightEntry(f"{ours}expert_bias", (theirs + experts.bias,))
    yield from gated_experts(ours, theirs, config.moe.num_experts, experts.matrices)
    if experts.shared is not None:
        yield from gated_entries(f"{ours}shared.", layer + experts.shared.place)
    if config.moe.shared_expert_gate:
        yield WeightEntry(f"{ours}shared_gate.weight", (f"{theirs}shared_expert_gate.weight",))
