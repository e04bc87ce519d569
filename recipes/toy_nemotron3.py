"""A random Nemotron 3 of toy size, as transformers writes it: python toy_nemotron3.py FOLDER TEXTS.

Every part of the released hybrids is there: Mamba2 in groups, attention without positions, latent experts of squared ReLU
behind a sigmoid router with balancing bias, a shared expert, a byte-level tokenizer. Used by
`continue_nemotron3.sh WORK --toy`.
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
config = transformers.NemotronHConfig(
    vocab_size=512,
    hidden_size=64,
    layers_block_type=[
        "linear_attention",
        "moe",
        "linear_attention",
        "full_attention",
        "moe",
        "linear_attention",
        "moe",
    ],
    num_attention_heads=4,
    num_key_value_heads=2,
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
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
transformers.NemotronHForCausalLM(config).save_pretrained(folder)
