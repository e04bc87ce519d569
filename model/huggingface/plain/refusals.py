"""Programs that reject or misread the classes of `families.py`: known of small models of each (`make clients`), or of its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.key_mixer_options import WindowOptions
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.plain.released import full_attention_interval
from amfm.model.huggingface.refusals import ClientName, Refusal

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
