"""A random hybrid of a released family at toy size, as transformers writes it: python toy_released.py FAMILY FOLDER TEXTS.

Every part of the released models is there, and a byte-level tokenizer. granite4: Mamba2 and attention without positions,
routed and shared experts, tied embeddings, the four multipliers. nemotron3: Mamba2 in groups, attention without positions,
latent experts of squared ReLU behind a sigmoid router with balancing bias, a shared expert. Used by
`continue_released.sh WORK --toy FAMILY`.
"""

import sys
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES = {
    "granite4": transformers.GraniteMoeHybridConfig(
        **COMMON,
        num_hidden_layers=4,
        layer_types=["mamba", "mamba", "attention", "mamba"],
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
    ),
    "nemotron3": transformers.NemotronHConfig(
        **COMMON,
        layers_block_type=[
            "linear_attention",
            "moe",
            "linear_attention",
            "full_attention",
            "moe",
            "linear_attention",
            "moe",
        ],
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        moe_latent_size=48,
        n_shared_experts=1,
        moe_shared_expert_intermediate_size=48,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    ),
}

family = sys.argv[1]
if family not in FAMILIES:
    sys.exit(f"toy_released: there is no family {family!r}; use {' or '.join(FAMILIES)}")
folder, texts = Path(sys.argv[2]), Path(sys.argv[3])
tokenizer = ByteLevelBPETokenizer()
files = [str(path) for path in sorted(texts.rglob("*")) if path.is_file()][:20]
tokenizer.train(files, vocab_size=512, special_tokens=["<|end_of_text|>"], show_progress=False)
transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer._tokenizer, eos_token="<|end_of_text|>"
).save_pretrained(folder)

torch.manual_seed(0)
transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(folder)
