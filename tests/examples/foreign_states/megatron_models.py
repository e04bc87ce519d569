"""Models, AdamW's state and distributed checkpoints that megatron-core itself makes, on a CPU.

It has no way without a GPU in a few places, which `on_cpu` stands in for: it asks which GPU is the current one, waits for
its copies, builds a Mamba mixer only where mamba_ssm is installed, whose kernels no test here runs, and norms a
hybrid by Transformer Engine. Its optimizer wrappers
allocate on a GPU too; what they do to save is called here on its own: `get_param_id_to_sharded_param_map` and
`optim_state_to_sharding_state` of dist_checkpointing give torch's AdamW the sharded keys that FP32Optimizer gives.
"""

from __future__ import annotations

import copy
import queue
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.fusions import fused_softmax
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm import gated_delta_net, mamba_mixer
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import MLATransformerConfig, TransformerConfig, multi_latent_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_layer, moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

# Of saves, which wait for their writers here. Megatron has a process of its own hold it, which imports PyTorch: 3 s.
filesystem_async._results_queue = queue.Queue()

VOCAB, WIDTH, LENGTH = 448, 32, 48
STEPS = 2
MOMENTS = ("exp_avg", "exp_avg_sq")


def transformer_config(**settings: Any) -> TransformerConfig:
    """A small transformer with grouped queries, RMSNorm and gated feed-forwards, initialized on the CPU."""
    kind = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    return kind(
        **{
            "num_layers": 2,
            "hidden_size": WIDTH,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "ffn_hidden_size": 48,
            "normalization": "RMSNorm",
            "layernorm_epsilon": 1e-5,
            "activation_func": torch.nn.functional.silu,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "use_cpu_initialization": True,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "apply_rope_fusion": False,
            "gradient_accumulation_fusion": False,
        }
        | settings
    )


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let megatron-core build and save without a GPU."""
    tracker = get_cuda_rng_tracker(inference_rng_tracker=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "fork", lambda *_: nullcontext())
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(mamba_mixer, "HAVE_MAMBA_SSM", True)
        patch.setattr(mamba_mixer, "ExtendedRMSNorm", GatedNorm)
        # Of newer versions the class is made in another module.
        patch.setattr(sys.modules[MambaStack.__module__], "TENorm", WrappedTorchNorm)
        # Of Transformer Engine, asked for without looking whether it is there.
        patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
        patch.setattr(moe_layer, "HAVE_TE", True)
        patch.setattr(moe_layer, "TELinear", Duplicated, raising=False)
        patch.setattr(gated_delta_net, "HAVE_FLA", True)
        patch.setattr(multi_latent_attention, "TELinear", Duplicated)
        patch.setattr(fused_softmax, "get_sliding_window_causal_mask", sliding_window_mask)
        yield


def sliding_window_mask(queries: int, keys: int, window: tuple[int, int]) -> torch.Tensor:
    """What is masked, as megatron-core's function of this name, which makes it on a GPU."""
    seen = torch.ones(queries, keys, dtype=torch.bool)
    return ~seen.triu(keys - queries - window[0]).tril(keys - queries + window[1])


class GatedNorm(torch.nn.Module):
    """The weight of a Mamba mixer's norm, saved as megatron-core saves its own."""

    def __init__(self, channels: int, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(channels))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """As ExtendedRMSNorm has it: cut over tensor ranks in its channels."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class Duplicated(torch.nn.Module):
    """The weight of a matrix that all ranks have whole, as Transformer Engine's layer with `duplicated` saves it."""

    def __init__(self, inputs: int, outputs: int, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(outputs, inputs))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Whole, on every rank."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, None, sharded_offsets
        )


class LatentAttention(DotProductAttention):
    """Attention of local layers for MLA, which passes channels that only Transformer Engine's takes; values have kv_channels."""

    def __init__(
        self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        assert v_channels in (None, self.config.kv_channels)


def gpt_of_newer_blocks(config: TransformerConfig) -> GPTModel:
    """GPTModel whose first layer mixes by Gated DeltaNet and whose second attends, with depths of prediction."""
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    delta = gated_delta_net.GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear
    )
    first = copy.deepcopy(spec.layer_specs[0])
    first.submodules.self_attention = ModuleSpec(module=gated_delta_net.GatedDeltaNet, submodules=delta)
    # Local layers are saved under the names of Transformer Engine's fused ones, which fuse the norm with in_proj here.
    renamed = first.submodules.sharded_state_dict_keys_map | {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
    first.submodules.sharded_state_dict_keys_map = renamed
    depths = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    spec.layer_specs[0] = first
    return GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=depths,
    )


def load_and_save(model: torch.nn.Module, source: Path, target: Path) -> None:
    """Load weights and moments from a folder, as its content says they are laid out, and save both again."""
    moments = {kind: {name: torch.zeros_like(value) for name, value in model.named_parameters()} for kind in MOMENTS}
    optimizer = adamw(model, moments)
    whole = sharded(model, optimizer, **dist_checkpointing.load_content_metadata(str(source)))
    # What layers keep for other precisions is not exported: `--dist-ckpt-strictness log_unexpected` leaves it out.
    extra = {name: None for name in whole["model"] if name.endswith("_extra_state")}
    whole["model"] = {name: value for name, value in whole["model"].items() if name not in extra}
    loaded = dist_checkpointing.load(whole, str(source))
    model.load_state_dict(loaded["model"] | extra)
    of_parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, weight in enumerate(of_parameters):
        optimizer.state[weight] |= {kind: loaded["optimizer"]["state"][index][kind] for kind in MOMENTS}
    assert loaded["iteration"] == STEPS
    save(model, target, optimizer)


def hybrid(config: TransformerConfig, pattern: str) -> MambaModel:
    """MambaModel of local layers, with an untied head."""
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    layers = MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=WrappedTorchNorm,
                mixer=ModuleSpec(
                    module=mamba_mixer.MambaMixer,
                    submodules=mamba_mixer.MambaMixerSubmodules(
                        in_proj=ColumnParallelLinear, out_proj=RowParallelLinear
                    ),
                ),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=ModuleSpec(
                    module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=ModuleSpec(module=MLP, submodules=linear),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        moe_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
    )
    spec = ModuleSpec(module=MambaStack, submodules=layers)
    return MambaModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        hybrid_override_pattern=pattern,
        share_embeddings_and_output_weights=False,
    )


def gpt(config: TransformerConfig, *, num_experts: int | None = None) -> GPTModel:
    """GPTModel of local layers, with rotary positions and an untied head."""
    if num_experts is None or isinstance(config.moe_layer_freq, int):
        spec = get_gpt_layer_local_spec(
            num_experts=num_experts,
            normalization=config.normalization,
            multi_latent_attention=config.multi_latent_attention,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    if config.multi_latent_attention:
        spec.submodules.self_attention.submodules.core_attention = LatentAttention
    return GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def adamw(model: torch.nn.Module, moments: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.optim.AdamW:
    """AdamW after STEPS steps, with the moments given by kind and parameter."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for name, weight in model.named_parameters():
        own = {kind: tensors[name] for kind, tensors in moments.items()}
        optimizer.state[weight] = {"step": torch.tensor(float(STEPS)), **own}
    return optimizer


def save(model: torch.nn.Module, folder: Path, optimizer: torch.optim.AdamW | None = None, **metadata: Any) -> None:
    """Write a distributed checkpoint of the model, and of the optimizer if there is one, into a new folder."""
    folder.mkdir()
    dist_checkpointing.save(sharded(model, optimizer, **metadata), str(folder))


def sharded(model: torch.nn.Module, optimizer: torch.optim.AdamW | None, **metadata: Any) -> dict[str, Any]:
    """What is saved and loaded: tensors of the model and moments with their places, and counters."""
    of_model = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": dp_cp_group()})
    whole: dict[str, Any] = {"model": of_model, "iteration": STEPS}
    if optimizer is not None:
        state = optimizer.state_dict()
        of_parameters = (weight for group in optimizer.param_groups for weight in group["params"])
        places = get_param_id_to_sharded_param_map(of_model, of_parameters)
        optim_state_to_sharding_state(state, places, exclude_keys=("step",))
        state["state"]["common_step"] = STEPS
        whole["optimizer"] = state
    return whole


def dp_cp_group() -> Any:
    """The group of data and context ranks, which the sharded state dicts ask for."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)
