"""Settings that no preset and no recipe sets, by the page that describes when to set them, which the reference links to.

Every other setting is in a file of configs/ or recipes/. A new setting joins one of them, or this table; a test holds both.
`stages.*` repeats rope, schedule and parallel, and so is left out.
"""

from __future__ import annotations

RARELY_SET: dict[str, dict[str, str]] = {
    "docs/checkpoints.md": {
        "train": "stop_after_minutes checkpoint_in_background checkpoint_store resume_step keep_every_steps replica_every_steps replica_folder timeout_seconds max_skipped_steps deterministic",
    },
    "docs/export.md": {"export": "every_steps max_position_embeddings"},
    "docs/conversion.md": {
        "model.lora_mixer": "num_experts top_k rank alpha targets balance_weight specialization_weight hard_from_step",
        "convert": "to blocks stage",
        "convert.transfer": "learning_rate scale",
        "convert.tune": "rank alpha targets adapters",
        "convert.tune.routing": "num_experts top_k balance_weight specialization_weight hard_from_step updates",
        "convert.upcycle": "num_copies num_slices top_copies router noise reset",
    },
    "docs/data.md": {
        "data": "skip skip_steps megatron_split packing shuffle mask_document_boundaries on_corruption",
        "data.cache": "folder max_bytes block_bytes",
        "data.sources.*": "text_column template encoding errors steps messages_column prompt_column completion_column max_bytes max_tokens",
        "data.sources.*.fim": "rate kind tokens",
        "data.sources.*.cut": "separator first_line size",
        "data.sources.*.filters": "min_characters max_characters keep_pattern drop_pattern exact_duplicates",
        "data.tokenizer": "algorithm eos_token byte_fallback control_tokens chat_template",
        "data.prepare": "preset part_bytes chunk_tokens seed on_damage",
        "data.phases.*": "start_sample weights sequence_length",
        "train.batch_ramp": "start_size increment steps",
        "stages.*": "steps micro_batch_size weights",
    },
    "docs/debugging.md": {
        "data.prepare": "num_actors",
        "train.profile": "steps ranks memory",
        "health": "check_state_every_steps",
        "train": "compile",
    },
    "docs/evaluation.md": {
        "evaluate": "tasks include_path every_steps limit num_fewshot micro_batch_size merge_last prompts",
        "validation.*": "name source paths batches tokens",
        "data.sources.*": "validation_fraction",
    },
    "docs/kernels.md": {
        "kernels": "backend attention experts",
    },
    "docs/launching.md": {
        "health": "on_nonfinite on_spike spike_rule spike_ratio spike_window spike_sigma max_rollbacks straggler_percent",
        "launch": "heartbeat_seconds max_restarts min_nodes node_wait_seconds storage_wait_seconds warm_restarts notify setup environment",
        "launch.kubernetes": "image namespace claim mount shared_memory grace_seconds accelerator",
        "launch.slurm": "partition account qos time_limit gpus cpus_per_task cpu_bind memory modules signal_seconds requeue container_image container_mounts container_python extra",
    },
    "docs/low_precision.md": {
        "low_precision": "block_types bf16_first_layers out_proj_recipe weight_gradient emulate measure_every_steps",
    },
    "docs/metrics.md": {"train": "inspect_every_steps"},
    "docs/mixers.md": {
        "model": "depth_scaled_init head norm norm_placement residual_in_fp32 logits_z_loss_weight",
        "model.attention_residuals": "blocks_per_source",
        "model.hyper_connections": "streams sinkhorn_iterations",
        "model.mamba": "conv_kernel conv_bias a_init_min a_init_max time_step_min time_step_max time_step_floor",
        "stages.*": "indexer",
        "model.attention.indexer": "top_k num_heads head_dim rope_fraction loss_weight stage",
        "model.attention.rope": "scaling linear_factor ntk_alpha yarn_factor yarn_original_length yarn_beta_fast yarn_beta_slow yarn_truncate",
        "model.attention.rope.llama3": "factor original_length slow_turns fast_turns",
        "model.feed_forward": "activation_limit bias",
        "model.attention": "bias",
        "model.moe": "bias forced_balance balance_counts group_score_top_k z_loss_weight",
        "model.mixers.deltanet": "conv_kernel chunk_size value_head_dim num_key_heads",
        "model.mixers.gated_deltanet": "allow_negative_eigenvalues head_norm_epsilon",
        "model.mixers.deltaproduct": "conv_kernel chunk_size value_head_dim num_key_heads",
        "model.mixers.kda": "chunk_size value_head_dim gate_rank gates decay_floor allow_negative_eigenvalues",
        "model.mixers.mla": "gate sinks latent_norm_epsilon",
        "model.mixers.mla.yarn": "factor original_length beta_fast beta_slow truncate mscale",
        "model.mixers.mla.indexer": "top_k num_heads head_dim rope_fraction loss_weight stage",
        "model.mixers.window": "qk_norm positions softmax_scale gate bias",
        "model.mixers.window.yarn": "factor original_length beta_fast beta_slow truncate",
        "model.mtp": "detach",
    },
    "docs/gpu.md": {
        "train": "cuda_graphs",
    },
    "docs/distillation.md": {"distill": "store temperature top_k kind"},
    "docs/moe_balance.md": {
        "model.moe": "bias_rule",
        "trace_choices": "every_steps max_mebibytes",
    },
    "docs/optimizers.md": {
        "optimizer": "epsilon state_dtype",
        "optimizer.rates": "embedding head norms router matrices vectors adamw",
        "optimizer.decays": "embedding head router matrices",
        "optimizer.muon": "rule momentum rounds update_rms per_head",
        "train": "freeze",
        "qk_clip": "limit",
        "ema": "decay every_steps start",
        "schedule": "decay_shape decay_end_step",
    },
    "docs/parallelism.md": {
        "parallel": "expert_tensor offload_optimizer",
        "train": "recompute_blocks gradient_sums",
    },
    "docs/structure.md": {
        "model.moe": "shared_expert_linear_kind shared_expert_linear_rank shared_expert_linear_blocks",
        "model.feed_forward": "linear_kind linear_rank linear_blocks",
        "model.self_guided_training": "share skip",
        "prune": "groups keep method start_step every_steps end_step",
        "forget": "every_steps until_step",
    },
    "docs/synthetic_tasks.md": {
        "data.synthetic": "num_symbols",
    },
    "docs/tracking.md": {
        "run": "name tensorboard wandb_project",
    },
}


def user_of(key: str) -> str | None:
    """The page that says when a setting is set; None for one that presets or recipes set."""
    section, _, name = key.rpartition(".")
    return next((page for page, named in RARELY_SET.items() if name in named.get(section, "").split()), None)
