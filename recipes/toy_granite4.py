"""A random Granite 4 of toy size, as transformers writes it: python toy_granite4.py FOLDER TEXTS.

Every part of the released hybrids is there: Mamba2 and attention without positions, routed and shared experts, tied
embeddings, the four multipliers, a byte-level tokenizer. Used by `continue_granite4.sh WORK --toy`.
"""

import sys
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

folder, texts = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = ByteLevelBPETokenizer()
files = [str(path) for path in sorted(texts.rglob("*")) if path.is_file()][:20]
tokenizer.train(files, vocab_size=512, special_tokens=["<|end_of_text|>"], show_progress=False)
transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer._tokenizer, eos_token="<|end_of_text|>"
).save_pretrained(folder)

torch.manual_seed(0)
config = transformers.GraniteMoeHybridConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=4,
    layer_types=["mamba", "mamba", "attention", "mamba"],
    num_attention_heads=4,
    num_key_value_heads=2,
    position_embedding_type="nope",
    attention_multiplier=0.0625,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    logits_scaling=6.0,
    num_local_experts=4,
    num_experts_per_tok=2,
    intermediate_size=32,
    shared_intermediate_size=48,
    mamba_n_heads=4,
    mamba_d_head=32,
    mamba_d_state=16,
    mamba_n_groups=1,
    mamba_expand=2,
    mamba_chunk_size=16,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
transformers.GraniteMoeHybridForCausalLM(config).save_pretrained(folder)
