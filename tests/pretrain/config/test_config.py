"""The schema: its frozen list of fields, and the pages that are made from it."""

import json
import re
from pathlib import Path

import yaml

from amfm.model.config.schema import RegisteredMixers
from amfm.pretrain.config.fields import REPEATED, describe_fields, flatten_settings, reference_page
from amfm.pretrain.config.file import config_schema
from amfm.pretrain.config.rarely_set import RARELY_SET
from amfm.pretrain.config.schema import RunConfig

ROOT = Path(__file__).parents[3]

# Growing this list is a decision: a new setting needs a reader, a description and a line here.
FIELDS = """
run.dir run.name run.initial_weights run.tensorboard run.wandb_project
model.pattern model.vocab_size model.hidden_size model.norm model.norm_epsilon model.norm_placement model.tie_embeddings model.head model.initializer_range
model.depth_scaled_init model.megatron_init model.residual_in_fp32 model.logits_z_loss_weight
model.mamba.num_heads model.mamba.head_dim model.mamba.state_size model.mamba.num_groups model.mamba.conv_kernel
model.mamba.conv_bias model.mamba.chunk_size model.mamba.keep_states model.mamba.a_init_min model.mamba.a_init_max
model.mamba.time_step_min model.mamba.time_step_max model.mamba.time_step_floor
model.attention.num_heads model.attention.num_kv_heads model.attention.head_dim model.attention.qk_norm
model.attention.positions model.attention.softmax_scale model.attention.gate model.attention.bias model.attention.sinks
model.attention.rope.theta model.attention.rope.fraction model.attention.rope.scaling model.attention.rope.linear_factor model.attention.rope.ntk_alpha
model.attention.rope.yarn_factor model.attention.rope.yarn_original_length model.attention.rope.yarn_beta_fast
model.attention.rope.yarn_beta_slow model.attention.rope.yarn_truncate model.attention.rope.llama3.factor
model.attention.rope.llama3.original_length model.attention.rope.llama3.slow_turns model.attention.rope.llama3.fast_turns
model.attention.indexer.top_k model.attention.indexer.num_heads model.attention.indexer.head_dim model.attention.indexer.rope_fraction
model.attention.indexer.loss_weight model.attention.indexer.stage
model.moe.num_experts model.moe.top_k model.moe.expert_hidden_size model.moe.shared_expert_hidden_size
model.moe.shared_expert_gate model.moe.shared_expert_linear_kind model.moe.shared_expert_linear_rank
model.moe.shared_expert_linear_blocks model.moe.activation model.moe.activation_limit model.moe.bias model.moe.router model.moe.normalize_probabilities model.moe.routed_scaling
model.moe.num_router_groups model.moe.router_group_top_k model.moe.group_score_top_k model.moe.expert_bias model.moe.bias_rule model.moe.bias_update_rate
model.moe.auxiliary_loss_weight model.moe.sequence_loss_weight model.moe.balance_counts model.moe.z_loss_weight model.moe.latent_size
model.moe.capacity_factor model.moe.overflow model.moe.forced_balance
model.feed_forward.hidden_size model.feed_forward.activation model.feed_forward.activation_limit model.feed_forward.bias model.feed_forward.linear_kind
model.feed_forward.linear_rank model.feed_forward.linear_blocks
model.mixers.deltanet.conv_kernel model.mixers.deltanet.chunk_size model.mixers.deltanet.num_heads
model.mixers.deltanet.head_dim model.mixers.deltanet.value_head_dim model.mixers.deltanet.num_key_heads
model.mixers.deltanet.allow_negative_eigenvalues
model.mixers.gated_deltanet.conv_kernel model.mixers.gated_deltanet.chunk_size model.mixers.gated_deltanet.num_heads
model.mixers.gated_deltanet.head_dim model.mixers.gated_deltanet.value_head_dim
model.mixers.gated_deltanet.num_key_heads model.mixers.gated_deltanet.allow_negative_eigenvalues model.mixers.gated_deltanet.head_norm_epsilon
model.mixers.deltaproduct.conv_kernel model.mixers.deltaproduct.chunk_size model.mixers.deltaproduct.num_heads
model.mixers.deltaproduct.head_dim model.mixers.deltaproduct.value_head_dim model.mixers.deltaproduct.num_key_heads
model.mixers.deltaproduct.allow_negative_eigenvalues model.mixers.deltaproduct.num_steps
model.mixers.deltaproduct.decay
model.mixers.hgrn2.conv_kernel model.mixers.hgrn2.chunk_size model.mixers.hgrn2.num_heads model.mixers.hgrn2.head_dim
model.mixers.hgrn2.value_head_dim
model.mixers.kda.conv_kernel model.mixers.kda.chunk_size model.mixers.kda.num_heads model.mixers.kda.head_dim
model.mixers.kda.value_head_dim model.mixers.kda.gate_rank model.mixers.kda.gates model.mixers.kda.decay_floor model.mixers.kda.allow_negative_eigenvalues
model.mixers.short_conv.conv_kernel
model.mixers.mla.num_heads model.mixers.mla.latent_size model.mixers.mla.query_latent_size
model.mixers.mla.nope_head_dim model.mixers.mla.rope_head_dim model.mixers.mla.value_head_dim model.mixers.mla.positions
model.mixers.mla.rope_theta model.mixers.mla.gate model.mixers.mla.latent_norm_epsilon model.mixers.mla.sinks
model.mixers.mla.yarn.factor model.mixers.mla.yarn.original_length model.mixers.mla.yarn.beta_fast
model.mixers.mla.yarn.beta_slow model.mixers.mla.yarn.truncate model.mixers.mla.yarn.mscale
model.mixers.mla.indexer.top_k model.mixers.mla.indexer.num_heads model.mixers.mla.indexer.head_dim model.mixers.mla.indexer.rope_fraction
model.mixers.mla.indexer.loss_weight model.mixers.mla.indexer.stage
model.mixers.window.num_heads model.mixers.window.num_kv_heads model.mixers.window.window model.mixers.window.head_dim
model.mixers.window.qk_norm model.mixers.window.positions model.mixers.window.rope_theta model.mixers.window.softmax_scale
model.mixers.window.gate model.mixers.window.bias model.mixers.window.sinks
model.mixers.window.yarn.factor model.mixers.window.yarn.original_length model.mixers.window.yarn.beta_fast
model.mixers.window.yarn.beta_slow model.mixers.window.yarn.truncate
model.self_guided_training.share model.self_guided_training.skip
model.lora_mixer.num_experts model.lora_mixer.top_k model.lora_mixer.rank model.lora_mixer.alpha model.lora_mixer.targets
model.lora_mixer.balance_weight model.lora_mixer.specialization_weight model.lora_mixer.hard_from_step
model.multipliers.embedding model.multipliers.residual model.multipliers.logits model.attention_residuals.blocks_per_source model.hyper_connections.streams model.hyper_connections.sinkhorn_iterations model.mup.base_hidden_size
model.mtp.loss_weight model.mtp.shared model.mtp.detach
data.store data.skip data.skip_steps data.validation_fraction data.megatron_split data.packing data.shuffle data.mask_document_boundaries data.num_workers
data.on_corruption
data.cache.folder data.cache.max_bytes data.cache.block_bytes
data.sources.*.name data.sources.*.paths data.sources.*.text_column data.sources.*.template data.sources.*.encoding data.sources.*.errors data.sources.*.steps data.sources.*.messages_column
data.sources.*.prompt_column data.sources.*.completion_column
data.sources.*.weight data.sources.*.validation_fraction data.sources.*.max_bytes data.sources.*.max_tokens
data.sources.*.cut.separator data.sources.*.cut.first_line data.sources.*.cut.size
data.sources.*.fim.rate data.sources.*.fim.kind data.sources.*.fim.tokens
data.sources.*.filters.min_characters data.sources.*.filters.max_characters data.sources.*.filters.keep_pattern
data.sources.*.filters.drop_pattern data.sources.*.filters.exact_duplicates
data.synthetic.task data.synthetic.num_pairs data.synthetic.num_writes data.synthetic.num_keys data.synthetic.num_values
data.synthetic.num_copied data.synthetic.num_symbols
data.tokenizer.model data.tokenizer.eos_token data.tokenizer.algorithm data.tokenizer.vocab_size
data.tokenizer.byte_fallback data.tokenizer.training_bytes data.tokenizer.control_tokens data.tokenizer.chat_template
data.prepare.preset data.prepare.num_actors data.prepare.part_bytes data.prepare.chunk_tokens data.prepare.on_damage
data.prepare.seed
data.phases.*.start_sample data.phases.*.weights data.phases.*.sequence_length
train.steps train.stop_after_steps train.stop_after_minutes train.sequence_length train.micro_batch_size train.global_batch_size train.seed
train.precision train.checkpoint_every_steps train.checkpoint_in_background train.keep_last train.checkpoint_store
train.resume_step train.keep_every_steps train.replica_every_steps train.replica_folder
train.validate_every_steps train.validation_batches
train.log_every_steps train.inspect_every_steps train.timeout_seconds train.max_skipped_steps train.compile train.cuda_graphs train.recompute
train.recompute_blocks train.freeze train.gradient_sums train.num_threads train.deterministic
train.batch_ramp.start_size train.batch_ramp.increment train.batch_ramp.steps
train.profile.steps train.profile.ranks train.profile.memory
optimizer.kind optimizer.learning_rate optimizer.beta1 optimizer.beta2 optimizer.epsilon optimizer.weight_decay
optimizer.clip_grad_norm optimizer.state_dtype optimizer.rates.embedding optimizer.rates.head optimizer.rates.norms optimizer.rates.router optimizer.rates.matrices
optimizer.rates.vectors optimizer.rates.adamw optimizer.decays.embedding optimizer.decays.head optimizer.decays.router
optimizer.decays.matrices optimizer.muon.rule optimizer.muon.momentum optimizer.muon.rounds optimizer.muon.update_rms
optimizer.muon.per_head
schedule.kind schedule.warmup_steps schedule.decay_steps schedule.decay_end_step schedule.decay_shape schedule.min_ratio
stages.*.name stages.*.tokens stages.*.steps stages.*.sequence_length stages.*.micro_batch_size
stages.*.global_batch_size stages.*.indexer stages.*.weights stages.*.learning_rate stages.*.recompute stages.*.recompute_blocks
stages.*.rope.theta stages.*.rope.fraction stages.*.rope.scaling stages.*.rope.linear_factor stages.*.rope.ntk_alpha stages.*.rope.yarn_factor
stages.*.rope.yarn_original_length stages.*.rope.yarn_beta_fast stages.*.rope.yarn_beta_slow stages.*.rope.yarn_truncate
stages.*.rope.llama3.factor
stages.*.rope.llama3.original_length stages.*.rope.llama3.slow_turns stages.*.rope.llama3.fast_turns
stages.*.schedule.kind stages.*.schedule.warmup_steps stages.*.schedule.decay_steps
stages.*.schedule.decay_end_step stages.*.schedule.decay_shape
stages.*.schedule.min_ratio
stages.*.parallel.tensor stages.*.parallel.sequence_parallel stages.*.parallel.expert stages.*.parallel.expert_tensor
stages.*.parallel.overlap_experts stages.*.parallel.expert_buffer_factor stages.*.parallel.context stages.*.parallel.pipeline stages.*.parallel.schedule
stages.*.parallel.virtual_stages stages.*.parallel.balance stages.*.parallel.zero_stage stages.*.parallel.offload_optimizer
parallel.tensor parallel.sequence_parallel parallel.expert parallel.expert_tensor parallel.overlap_experts
parallel.expert_buffer_factor parallel.context parallel.pipeline parallel.schedule parallel.virtual_stages parallel.balance parallel.zero_stage parallel.offload_optimizer
health.on_nonfinite health.on_spike health.spike_rule health.spike_ratio health.spike_window health.spike_sigma health.max_rollbacks
health.straggler_percent
health.check_state_every_steps
kernels.backend kernels.attention kernels.experts
low_precision.recipe low_precision.block_types low_precision.bf16_first_layers low_precision.bf16_last_layers low_precision.out_proj_recipe
low_precision.weight_gradient low_precision.activation_storage low_precision.dispatch low_precision.quantize_weights low_precision.emulate low_precision.measure_every_steps
export.target export.every_steps export.max_position_embeddings
evaluate.tasks evaluate.include_path evaluate.every_steps evaluate.limit evaluate.num_fewshot evaluate.micro_batch_size evaluate.merge_last evaluate.prompts
validation.*.name validation.*.source validation.*.paths validation.*.batches validation.*.tokens
prune.groups prune.keep prune.method prune.start_step prune.every_steps prune.end_step
forget.every_steps forget.until_step qk_clip.limit ema.decay ema.every_steps ema.start distill.teacher distill.store distill.weight distill.temperature distill.top_k distill.kind trace_choices.every_steps trace_choices.max_mebibytes
convert.teacher convert.to convert.blocks convert.keep_blocks convert.stage
convert.upcycle.num_copies convert.upcycle.num_slices convert.upcycle.top_copies convert.upcycle.router
convert.upcycle.noise convert.upcycle.reset
convert.transfer.steps convert.transfer.learning_rate convert.transfer.scale
convert.tune.steps convert.tune.learning_rate convert.tune.rank convert.tune.alpha convert.tune.targets convert.tune.adapters
convert.tune.routing.num_experts convert.tune.routing.top_k convert.tune.routing.balance_weight convert.tune.routing.specialization_weight
convert.tune.routing.hard_from_step convert.tune.routing.updates
launch.heartbeat_seconds launch.max_restarts launch.min_nodes launch.node_wait_seconds launch.storage_wait_seconds launch.spare_nodes
launch.warm_restarts launch.notify launch.setup
launch.environment
launch.slurm.partition launch.slurm.account launch.slurm.qos launch.slurm.time_limit launch.slurm.gpus
launch.slurm.cpus_per_task launch.slurm.cpu_bind launch.slurm.memory launch.slurm.modules launch.slurm.signal_seconds launch.slurm.requeue launch.slurm.container_image
launch.slurm.container_mounts launch.slurm.container_python launch.slurm.extra
launch.kubernetes.image launch.kubernetes.namespace launch.kubernetes.claim launch.kubernetes.mount
launch.kubernetes.shared_memory launch.kubernetes.grace_seconds launch.kubernetes.accelerator launch.kubernetes.bucket
"""


def test_the_field_list_is_frozen():
    assert [row.key for row in describe_fields(of_packages=False)] == FIELDS.split()


def settings_of_presets_and_recipes() -> set[str]:
    """Dotted keys that a file of configs/ or recipes/ sets, in YAML or as KEY=VALUE of a script."""
    found: set[str] = set()
    for path in [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("recipes/**/*.yaml")]:
        found |= {re.sub(r"\.\d+(?=\.)", ".*", key) for key in flatten_settings(yaml.safe_load(path.read_text()))}
    for path in [*ROOT.glob("recipes/*.sh"), *ROOT.glob("recipes/*.md")]:
        keys = re.findall(r"(?<![\w.])[a-z_]+(?:\.[a-z_0-9]+)+(?==)", path.read_text())
        found |= {re.sub(r"\.\d+(?=\.)", ".*", key) for key in keys}
    return found


def test_a_setting_is_set_by_a_preset_or_recipe_or_a_page_says_when_it_is() -> None:
    common = settings_of_presets_and_recipes()
    rows = [row for row in describe_fields(of_packages=False) if not row.key.startswith(REPEATED)]
    assert [row.key for row in rows if row.user is None and row.key not in common] == [], "name a page in RARELY_SET"
    assert [row.key for row in rows if row.user is not None and row.key in common] == [], "leave it out of RARELY_SET"
    listed = {f"{section}.{name}" for page in RARELY_SET.values() for section in page for name in page[section].split()}
    assert listed - {row.key for row in rows} == set(), "no such setting"
    for row in rows:
        if row.user is not None:
            text = (ROOT / row.user).read_text()
            assert re.search(rf"\b{row.key.split('.')[-1]}\b", text), f"{row.user} does not name {row.key}"


def test_every_field_says_what_it_means():
    assert [row.key for row in describe_fields() if not row.meaning.endswith((".", ")"))] == []


def test_the_reference_page_is_fresh():
    page = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert page.read_text() == reference_page(), "run: make docs"


def test_the_schema_for_editors_is_fresh():
    written = json.loads((Path(__file__).parents[3] / "configs" / "schema.json").read_text())
    schema = config_schema()
    mixers = schema["$defs"]["RegisteredMixers"]["properties"]
    packaged = {
        RegisteredMixers.model_fields[name].annotation.__args__[0].__name__ for name in RegisteredMixers.packages
    }
    schema["$defs"]["RegisteredMixers"]["properties"] = {
        name: value for name, value in mixers.items() if name not in RegisteredMixers.packages
    }
    schema["$defs"] = {name: value for name, value in schema["$defs"].items() if name not in packaged}
    assert written == schema, "run: make docs"


def test_the_schema_accepts_partial_files_and_knows_every_section():
    schema = config_schema()
    assert "required" not in schema
    assert set(schema["properties"]) == {"extends", *RunConfig.model_fields}
    assert schema["$defs"]["TrainConfig"]["properties"]["precision"]["enum"] == ["auto", "float32", "bf16"]
