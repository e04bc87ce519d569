"""The table of arguments names settings that exist, has megatron-core's defaults, and is what the page shows."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from amfm_foreign_states.megatron_arguments.table import read_table

from amfm.pretrain.config.fields import describe_fields
from tests.examples.foreign_states.megatron_arguments.page import renew

PAGE = Path(__file__).parents[4] / "docs" / "from_megatron.md"
CLASSES = {
    "transformer/transformer_config.py": "TransformerConfig",
    "model_parallel_config.py": "ModelParallelConfig",
    "optimizer/optimizer_config.py": "OptimizerConfig",
}
# Fields of megatron-core 0.16.1 that no user of a pretraining script sets: functions, objects, inference, libraries' own.
OTHERS = """
apply_residual_connection_post_layernorm gated_linear_unit activation_func activation_func_fp8_input_store init_method
output_layer_init_method embedding_init_method memory_efficient_layer_norm fused_single_qkv_rope fp8_quantizer_factory
fp8_multi_head_attention tp_only_amax_red use_kitchen use_kitchen_attention kitchen_attention_backend fp4_quantizer_factory
moe_token_dropping cuda_graph_use_single_mempool cuda_graph_retain_backward_graph clone_scatter_output_in_embedding
disable_parameter_transpose_cache config_logger_dir flash_decode batch_invariant_mode use_te_activation_func use_te_rng_tracker
inference_rng_tracker inference_sampling_seed symmetric_ar_type use_inference_optimized_layers inference_fuse_tp_communication
mlp_chunks_for_prefill hetereogenous_dist_checkpoint quant_recipe min_offloaded_tensor_size pipeline_model_parallel_comm_backend
max_seqlen_per_dp_cp_rank moe_extended_tp params_dtype timers finalize_model_grads_func grad_scale_func no_sync_func
grad_sync_func param_sync_func enable_autocast autocast_dtype num_microbatches_with_partial_activation_checkpoints
tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1
tp_comm_bootstrap_backend ep_overlap_early_attn_memory_release pipeline_dtype variable_seq_lengths batch_p2p_comm batch_p2p_sync
use_ring_exchange_p2p deallocate_pipeline_outputs wgrad_deferral_limit overlap_p2p_comm_warmup_flush cpu_offloading_num_layers
_cpu_offloading_context cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering barrier_with_L1_time
store_param_remainders initial_loss_scale min_loss_scale loss_scale_window hysteresis muon_fp32_matmul_prec
use_torch_optimizer_for_cpu_offload pin_cpu_grads pin_cpu_params
"""
# The same of 0.18.2, which pip chooses from Python 3.12 on: inference, HybridEP, paged stashes, optimizers that we have not.
OTHERS += """
adaptive_muon_eps adaptive_muon_moment2_method cpu_offloading_retain_pinned_cpu_buffers
fine_grained_offloading_max_inflight_offloads high_priority_a2a_comm_stream inference_cuda_graph_scope
inference_disable_triton_nvls_kernels inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
inference_moe_token_dispatcher_type lion_beta2 mlp_chunks_for_training moe_hybridep_num_blocks_permute
moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing moe_mlp_glu_interleave_size
moe_pad_experts_for_cuda_graph_inference moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda
moe_paged_stash_page_size moe_permute_fusion_into_hybridep moe_single_grouped_bias mup_width_mult nccl_all_reduce_for_prefill
optimizer_cuda_graph overlap_dispatch_backward_with_experts_wgrad soap_precondition_frequency soap_use_kl_shampoo
use_grouped_gemm_for_dense_mlp use_layer_wise_distributed_optimizer use_transformer_engine_op_fuser
"""
# Numbers of megatron-core that its programs' flags replace.
REPLACED = {"muon_momentum"}


def core_fields() -> dict[str, Any]:
    """Fields of megatron-core's configurations and their defaults, read and not imported; ... if none is written."""
    spec = find_spec("megatron.core") if find_spec("megatron") else None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs megatron-core")
    found: dict[str, Any] = {}
    for file, name in CLASSES.items():
        tree = ast.parse(Path(next(iter(spec.submodule_search_locations)), file).read_text(encoding="utf-8"))
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = node.value.value if isinstance(node.value, ast.Constant) else ...
    return found


def test_every_setting_of_the_table_exists() -> None:
    keys = {row.key for row in describe_fields()}
    sections = {key[: place.start()] for key in keys for place in re.finditer(r"\.", key)}
    lost = [name for row in read_table().rows for name in row.settings if name not in keys | sections]
    assert not lost


def test_every_field_of_megatron_core_is_in_the_table_or_named_here() -> None:
    table = read_table()
    lost = [name for name in core_fields() if table.resolve(name, None)[0] not in table.by_name]
    assert sorted(set(lost) - set(OTHERS.split())) == []


def test_defaults_that_change_numbers_are_those_of_megatron_core() -> None:
    table, compared = read_table(), 0
    for field, default in core_fields().items():
        name = table.resolve(field, None)[0]
        row = table.by_name.get(name)
        if row is None or row.effect == "-" or default in (None, ...) or name in REPLACED:
            continue
        known = table.default(name)
        if row.kind == "~" and known is None:
            continue
        assert known == default or (not known and not default) or row.kind == "always", (name, known, default)
        compared += 1
    assert compared > 50, compared


def test_no_argument_is_twice_and_no_spelling_is_lost() -> None:
    table = read_table()
    names = [name for row in table.rows for name in row.names]
    assert len(names) == len(set(names)) and len(names) > 387
    assert {argument for argument, _ in table.spellings.values()} <= table.by_name.keys()


def test_the_page_is_made_of_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert renew(page) == page, "run make docs"
