"""Programs that reject or misread the classes of `families.py`: known of small models of each (`make clients`), or of its source.

Fields of config.json that released models of a class have and transformers 5.24 does not ask for, but other programs do.

Each function builds those of one class from the fields that config.json has so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.key_mixer_options import WindowOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.refusals import ClientName, Refusal

Fields = Mapping[str, Any]


def none_missing(fields: Fields) -> dict[str, Any]:
    """Other programs find what they read."""
    return {}


def of_qwen3_moe(fields: Fields) -> dict[str, Any]:
    """The number of experts, which transformers 5 calls otherwise."""
    return {"num_experts": fields["num_local_experts"]}


def of_glm4_moe(fields: Fields) -> dict[str, Any]:
    """A rotation that is not scaled is said, too."""
    return {"rope_scaling": fields.get("rope_scaling")}


def of_minimax_m2(fields: Fields) -> dict[str, Any]:
    """How many channels of a head are rotated, the router, and that there is no shared expert."""
    return {
        "rotary_dim": _rotated(fields, fields["head_dim"]),
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "shared_intermediate_size": 0,
    }


def of_hy_v3(fields: Fields) -> dict[str, Any]:
    """How many layers before the first with experts are dense, and what transformers calls otherwise."""
    types = fields["mlp_layer_types"]
    return {
        "first_k_dense_replace": types.index("sparse") if "sparse" in types else len(types),
        "expert_hidden_dim": fields["moe_intermediate_size"],
        "route_norm": True,
        "qk_norm": True,
    }


def of_bamba(fields: Fields) -> dict[str, Any]:
    """How many channels of a head are rotated."""
    return {"attn_rotary_emb": _rotated(fields, fields["hidden_size"] // fields["num_attention_heads"])}


def of_gemma3_text(fields: Fields) -> dict[str, Any]:
    """The bases of both rotations, and n where every n-th layer and no other has full attention."""
    ropes, types = fields["rope_parameters"], fields["layer_types"]
    found: dict[str, Any] = {
        "rope_theta": ropes["full_attention"]["rope_theta"],
        "rope_local_base_freq": ropes["sliding_attention"]["rope_theta"],
    }
    interval = full_attention_interval(types)
    return found if interval is None else found | {"sliding_window_pattern": interval}


def full_attention_interval(types: list[str]) -> int | None:
    """Find n where every n-th layer and no other has full attention; None where there is none."""
    for interval in range(1, len(types) + 1):
        if all((kind == "full_attention") == (layer % interval == 0) for layer, kind in enumerate(types, 1)):
            return interval
    return None


def _rotated(fields: Fields, head_dim: int) -> int:
    return int(head_dim * fields["rope_parameters"]["partial_rotary_factor"])


RELEASED: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "qwen3_moe": of_qwen3_moe,
    "glm4_moe": of_glm4_moe,
    "minimax_m2": of_minimax_m2,
    "hy_v3": of_hy_v3,
    "bamba": of_bamba,
    "gemma3_text": of_gemma3_text,
}


# Whose windows llama.cpp's converter does not write and mlx-lm's classes do not have.
WITHOUT_WINDOWS = ("mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
GEMMA_INTERVAL = 6


def plain_refusals(name: str, config: ModelConfig, tokenizer_kind: str) -> list[Refusal]:
    """Name the programs that are known to reject or misread a model of a class."""
    return [*_without_windows(name, config), *OF_CLASSES.get(name, _none)(config)]


def _none(config: ModelConfig) -> Iterator[Refusal]:
    return iter(())


def _without_windows(name: str, config: ModelConfig) -> Iterator[Refusal]:
    if name not in WITHOUT_WINDOWS or "W" not in config.letters:
        return
    for client in ("llama.cpp", "mlx-lm"):
        rule = (
            f"it attends past the windows of {name} and silently produces different values; train with * for {client}"
        )
        yield Refusal(client, rule, misreads=True)


def _of_qwen3_moe(config: ModelConfig) -> Iterator[Refusal]:
    if "-" in config.letters:
        rule = (
            'its converter has no dense layers in qwen3_moe and ends with "Can not map tensor"; train without - for it'
        )
        yield Refusal("llama.cpp", rule)


def _of_qwen2_moe(config: ModelConfig) -> Iterator[Refusal]:
    yield from _weighs_by_all(config, "llama.cpp", "mlx-lm")


def _of_olmoe(config: ModelConfig) -> Iterator[Refusal]:
    yield from _weighs_by_all(config, "llama.cpp", "vllm")


def _weighs_by_all(config: ModelConfig, *clients: ClientName) -> Iterator[Refusal]:
    """Programs that do not read norm_topk_prob, which is false in released models of the class."""
    if config.moe is None or not config.moe.normalize_probabilities:
        return
    for client in clients:
        rule = (
            "model.moe.normalize_probabilities=true silently produces different values, because it does not read norm_topk_prob; "
            f"train with false for {client}"
        )
        yield Refusal(client, rule, misreads=True)


def _of_mixtral(config: ModelConfig) -> Iterator[Refusal]:
    heads = config.block_options("W" if "W" in config.letters else "*")
    assert isinstance(heads, AttentionConfig | WindowOptions), "mixtral has attention or windows"
    if heads.head_dim * heads.num_heads != config.hidden_size:
        size = config.hidden_size / heads.num_heads
        rule = (
            f'heads of {heads.head_dim} channels end with "Expected shape", because it does not read head_dim; train with '
            f"hidden_size / num_heads, {size:g}, for mlx-lm"
        )
        yield Refusal("mlx-lm", rule)


def _of_hy_v3(config: ModelConfig) -> Iterator[Refusal]:
    yield Refusal(
        "llama.cpp", 'its converter ends with "AttributeError: HY_V3", which the gguf of its release lacks; use vLLM'
    )
    yield Refusal("mlx-lm", "it has no class hy_v3; use vLLM")
    seconds = config.letters[1::2]
    if seconds != tuple(sorted(seconds)):
        rule = "it takes the layers before the first with E for the dense ones; put every - before the first E"
        yield Refusal("vllm", rule)


def _of_minimax_m2(config: ModelConfig) -> Iterator[Refusal]:
    rule = "its experts on a CPU take no router of sigmoids and end with an AssertionError; serve it from a GPU"
    yield Refusal("vllm", rule)


def _of_bamba(config: ModelConfig) -> Iterator[Refusal]:
    other = "read the export with transformers"
    yield Refusal("llama.cpp", f"it silently produces different values for bamba; {other}", misreads=True)
    yield Refusal("mlx-lm", f"it has no class bamba; {other}")
    rule = 'it has no class for bamba and ends with "does not dispatch through the Transformers attention interface"'
    yield Refusal("vllm", f"{rule}; {other}")


def _of_gemma3_text(config: ModelConfig) -> Iterator[Refusal]:
    types = ["full_attention" if letter == "*" else "sliding_attention" for letter in config.letters[0::2]]
    interval = full_attention_interval(types)
    if interval != GEMMA_INTERVAL:
        rule = (
            f"it takes every {GEMMA_INTERVAL}th layer for full attention, as in releases, and silently produces different values; make "
            "it every 6th mixer for llama.cpp"
        )
        yield Refusal("llama.cpp", rule, misreads=True)
    if interval is None:
        rule = "it takes every n-th layer for full attention; make it every n-th mixer for mlx-lm"
        yield Refusal("mlx-lm", rule, misreads=True)


OF_CLASSES: dict[str, Callable[[ModelConfig], Iterator[Refusal]]] = {
    "qwen3_moe": _of_qwen3_moe,
    "qwen2_moe": _of_qwen2_moe,
    "olmoe": _of_olmoe,
    "mixtral": _of_mixtral,
    "hy_v3": _of_hy_v3,
    "minimax_m2": _of_minimax_m2,
    "bamba": _of_bamba,
    "gemma3_text": _of_gemma3_text,
}
