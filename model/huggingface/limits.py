"""What users of transformers are used to and a native class does not do, as sentences for the model card.

Tried with transformers 5.24 and peft 0.21 (`tests/pretrain/export/test_habits.py`), whose classes are as they are.
"""

from __future__ import annotations

IGNORED_ARGUMENTS = "Arguments that the class does not know are ignored without a word: check their spelling."
NO_CLASSIFIER = "transformers has no class for sequence classification of it (reward models); `amfm export --target own` brings one."
NO_EMBEDDINGS = "`generate` does not begin with `inputs_embeds`."
NO_ADAPTER_ON_OUTPUT = (
    "peft refuses adapters on `out_proj` and `conv1d` of Mamba2, and with them `target_modules='all-linear'`: name the others "
    "(docs/finetuning.md of amfm has a table)."
)


def packed_rows(blocks: str) -> str:
    """Report what blocks with a state make of packed rows."""
    return (
        f"Documents packed into one row run into each other in {blocks} where `position_ids` alone name them. Give `seq_idx` too "
        "(`DataCollatorWithFlattening(return_seq_idx=True)`): with the kernels of the class it is honoured, without them refused. "
        "Or leave packing off."
    )
