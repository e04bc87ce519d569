"""A checkpoint that records other arguments than the configuration has is rejected, each by name with both values."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from amfm_foreign_states.megatron_arguments.compare import check_recorded

from amfm.data_pipeline.config import DataConfig
from tests.pretrain.tiny_run import tiny_config

# Of the model and the training of tiny_config, as Megatron-LM would record them.
RECORD: dict[str, Any] = {
    "hybrid_layer_pattern": "ME*-", "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "group_query_attention": True,
    "num_query_groups": 2, "kv_channels": 8, "ffn_hidden_size": 48, "squared_relu": True, "normalization": "RMSNorm",
    "add_bias_linear": False, "position_embedding_type": "none", "padded_vocab_size": 448, "layernorm_epsilon": 1e-5,
    "untie_embeddings_and_output_weights": True, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_state_dim": 16,
    "mamba_num_groups": 2, "num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "rotary_base": 10000,
    "moe_shared_expert_intermediate_size": 16, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": None, "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001, "softmax_scale": None,
    "apply_layernorm_1p": False, "qk_layernorm": False, "tensor_model_parallel_size": 8, "log_interval": 77, "dsa_indexer_topk_freq": 1,
    "params_dtype": torch.float32, "mup_output_mult": 1.0, "fp16": False, "swiglu": False, "hybrid_override_pattern": None,
}  # fmt: skip


def check(folder: Path, *, has_moments: bool = False, changed: tuple[str, ...] = (), **other: Any) -> None:
    torch.save({"args": Namespace(**(RECORD | other)), "iteration": 2}, folder / "common.pt")
    data = DataConfig.model_validate({"store": "none", "sources": [{"name": "a", "paths": ["a.txt"]}]})
    check_recorded(folder, tiny_config(data, folder / "run"), has_moments=has_moments, changed=changed)


def test_a_record_of_the_same_model_passes(tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("moe_router_topk", 1, "moe_router_topk=1 means model.moe.top_k=1, and model.moe.top_k is 2"),
        ("moe_router_topk_scaling_factor", 2.5, "means model.moe.routed_scaling=2.5, and model.moe.routed_scaling is 1.0"),
        ("layernorm_epsilon", 1e-3, "means model.norm_epsilon=0.001, and model.norm_epsilon is 1e-05"),
        ("position_embedding_type", "rope", "means model.attention.positions='rope', and model.attention.positions is 'none'"),
        ("softmax_scale", 0.5, "means model.attention.softmax_scale=0.5, and model.attention.softmax_scale is None"),
        ("hybrid_layer_pattern", "MEME*-", "model.pattern='MEME*-'"),
        ("moe_router_score_function", "softmax", "model.moe.router='softmax'"),
        ("swiglu", True, "model.feed_forward.activation='swiglu'"),
        ("apply_layernorm_1p", True, "apply_layernorm_1p=True is not there"),
        ("add_bias_linear", True, "add_bias_linear=True means model.attention.bias=True, and model.attention.bias is False"),
        ("squared_relu", False, "means model.feed_forward.activation='gelu'"),
        ("qk_l2_norm", True, "qk_l2_norm=True is not there"),
        ("padded_vocab_size", 512, "padded_vocab_size=512 means model.vocab_size=512, and model.vocab_size is 448"),
    ],
)  # fmt: skip
def test_a_model_that_contradicts_is_refused_with_both_values(
    name: str, value: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="contradicts the configuration") as caught:
        check(tmp_path, **{name: value})
    assert message in str(caught.value)


def test_training_is_compared_where_moments_continue(tmp_path: Path) -> None:
    check(tmp_path, adam_beta2=0.5)
    with pytest.raises(ValueError, match=r"adam_beta2=0.5 means optimizer.beta2=0.5, and optimizer.beta2 is 0.95"):
        check(tmp_path, has_moments=True, adam_beta2=0.5)


def test_a_change_on_purpose_is_named_and_one_that_is_none_is_refused(tmp_path: Path) -> None:
    check(tmp_path, softmax_scale=0.5, changed=("--softmax-scale",))
    with pytest.raises(ValueError, match=r"moe_router_topk: .* do not differ in it"):
        check(tmp_path, changed=("moe_router_topk",))


def test_layout_and_logs_may_differ_and_a_folder_without_a_record_passes(tmp_path: Path) -> None:
    check(tmp_path, tensor_model_parallel_size=2, log_interval=1, save="elsewhere")
    (tmp_path / "bare").mkdir()
    config = tiny_config(
        DataConfig.model_validate({"store": "none", "sources": [{"name": "a", "paths": ["a.txt"]}]}), tmp_path
    )
    check_recorded(tmp_path / "bare", config, has_moments=True)
