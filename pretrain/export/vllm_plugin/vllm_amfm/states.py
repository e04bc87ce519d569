"""Blocks with a state of one size, on vLLM's parts: Mamba2, the gated short convolution, Gated DeltaNet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

COPIES = {
    MambaAttentionBackendEnum.MAMBA2: MambaStateCopyFuncCalculator.mamba2_state_copy_func(),
    MambaAttentionBackendEnum.SHORT_CONV: MambaStateCopyFuncCalculator.short_conv_state_copy_func(),
    MambaAttentionBackendEnum.GDN_ATTN: MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func(),
}


def build_mamba2(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """`M`."""
    config = vllm_config.model_config.hf_config
    section = config.mamba
    return MambaMixer2(
        hidden_size=config.hidden_size,
        ssm_state_size=section["state_size"],
        conv_kernel_size=section["conv_kernel"],
        intermediate_size=section["num_heads"] * section["head_dim"],
        use_conv_bias=section["conv_bias"],
        use_bias=False,
        n_groups=section["num_groups"],
        num_heads=section["num_heads"],
        head_dim=section["head_dim"],
        rms_norm_eps=config.norm_epsilon,
        model_config=vllm_config.model_config,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
    )


class GatedShortConv(ShortConv):
    """`C`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config = vllm_config.model_config.hf_config
        options = SimpleNamespace(conv_L_cache=config.mixers["short_conv"]["conv_kernel"], conv_bias=False)
        super().__init__(
            options,
            config.hidden_size,
            layer_idx=0,
            model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        """x [N, D] -> y [N, D]."""
        y_ND = torch.empty_like(x_ND)
        super().forward(x_ND, y_ND)
        return y_ND


def build_gated_deltanet(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """`G`."""
    config = vllm_config.model_config.hf_config
    sizes = SimpleNamespace(
        hidden_size=config.hidden_size, hidden_act="silu", rms_norm_eps=config.norm_epsilon, **delta_sizes(config)
    )
    return QwenGatedDeltaNetAttention(sizes, vllm_config, prefix, gqa_interleaved_layout=False)


def delta_sizes(config: Any) -> dict[str, int]:
    """Sizes of Gated DeltaNet under the names of the class that vLLM's part was written for."""
    options = config.mixers["gated_deltanet"]
    return {
        "linear_num_value_heads": options["num_heads"],
        "linear_num_key_heads": options["num_key_heads"] or options["num_heads"],
        "linear_key_head_dim": options["head_dim"],
        "linear_value_head_dim": options["value_head_dim"] or options["head_dim"],
        "linear_conv_kernel_dim": options["conv_kernel"],
    }


def state_specs(vllm_config: VllmConfig) -> list[MambaSpec]:
    """Shapes and dtypes of the states of each kind of block that the pattern has, without the model."""
    config, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
    ranks, drafts = vllm_config.parallel_config.tensor_parallel_size, vllm_config.num_speculative_tokens
    dtype, names, specs = vllm_config.model_config.dtype, set(config.block_names()), []
    both = (dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype)
    if "mamba2" in names:
        section = config.mamba
        shapes = MambaStateShapeCalculator.mamba2_state_shape(
            tp_world_size=ranks,
            intermediate_size=section["num_heads"] * section["head_dim"],
            n_groups=section["num_groups"],
            num_heads=section["num_heads"],
            head_dim=section["head_dim"],
            state_size=section["state_size"],
            conv_kernel=section["conv_kernel"],
            num_spec=drafts,
        )
        specs.append((shapes, MambaStateDtypeCalculator.mamba2_state_dtype(*both)))
    if "gated_deltanet" in names:
        sizes = delta_sizes(config)
        shapes = MambaStateShapeCalculator.gated_delta_net_state_shape(
            ranks,
            sizes["linear_num_key_heads"],
            sizes["linear_num_value_heads"],
            sizes["linear_key_head_dim"],
            sizes["linear_value_head_dim"],
            sizes["linear_conv_kernel_dim"],
            drafts,
        )
        specs.append((shapes, MambaStateDtypeCalculator.gated_delta_net_state_dtype(*both)))
    if "short_conv" in names:
        shapes = MambaStateShapeCalculator.short_conv_state_shape(
            tp_world_size=ranks,
            intermediate_size=config.hidden_size,
            conv_kernel=config.mixers["short_conv"]["conv_kernel"],
            num_spec=drafts,
        )
        specs.append((shapes, MambaStateDtypeCalculator.short_conv_state_dtype(dtype, cache.mamba_cache_dtype)))
    return [MambaSpec(block_size=-1, shapes=tuple(shapes), dtypes=tuple(dtypes)) for shapes, dtypes in specs]
