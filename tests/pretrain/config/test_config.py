"""The YAML loader: what it accepts, and that each mistake is explained where it was made."""

import json
from pathlib import Path

import pytest

from pretrain.config.errors import ConfigError
from pretrain.config.fields import describe_fields, reference_page
from pretrain.config.file import config_schema, diff_configs, load_config, resolved_yaml
from pretrain.config.schema import RunConfig

BASE = """\
run:
  dir: runs/small
model:
  pattern: M*-
  vocab_size: 512
  hidden_size: 64
  mamba: {num_heads: 4, head_dim: 16, num_groups: 2}
  attention: {num_heads: 4, num_kv_heads: 2, head_dim: 16}
  feed_forward: {hidden_size: 128}
data:
  store: data/small
  tokenizer: {vocab_size: 512}
  sources:
    - name: plays
      paths: [plays.txt]
train:
  steps: 1e2
  sequence_length: 128
  micro_batch_size: 2
  global_batch_size: 4
optimizer:
  learning_rate: 1e-3
"""

# Growing this list is a decision: a new setting needs a reader, a description and a line here.
FIELDS = """
run.dir run.name run.initial_weights run.tensorboard run.wandb_project
model.pattern model.vocab_size model.hidden_size model.norm_epsilon model.tie_embeddings model.initializer_range
model.depth_scaled_init model.residual_in_fp32 model.logits_z_loss_weight
model.mamba.num_heads model.mamba.head_dim model.mamba.state_size model.mamba.num_groups model.mamba.conv_kernel
model.mamba.conv_bias model.mamba.chunk_size model.mamba.keep_states model.mamba.a_init_min model.mamba.a_init_max
model.mamba.time_step_min model.mamba.time_step_max model.mamba.time_step_floor
model.attention.num_heads model.attention.num_kv_heads model.attention.head_dim model.attention.qk_norm
model.attention.positions model.attention.softmax_scale model.attention.gate
model.attention.rope.theta model.attention.rope.fraction model.attention.rope.scaling model.attention.rope.ntk_alpha
model.attention.rope.yarn_factor model.attention.rope.yarn_original_length model.attention.rope.yarn_beta_fast
model.attention.rope.yarn_beta_slow
model.moe.num_experts model.moe.top_k model.moe.expert_hidden_size model.moe.shared_expert_hidden_size
model.moe.shared_expert_gate model.moe.activation model.moe.router model.moe.normalize_probabilities model.moe.routed_scaling
model.moe.num_router_groups model.moe.router_group_top_k model.moe.expert_bias model.moe.bias_update_rate
model.moe.auxiliary_loss_weight model.moe.sequence_loss_weight model.moe.z_loss_weight model.moe.latent_size
model.moe.capacity_factor model.moe.overflow
model.feed_forward.hidden_size model.feed_forward.activation
model.mixers.deltanet.conv_kernel model.mixers.deltanet.chunk_size model.mixers.deltanet.num_heads
model.mixers.deltanet.head_dim model.mixers.deltanet.value_head_dim model.mixers.deltanet.num_key_heads
model.mixers.deltanet.allow_negative_eigenvalues
model.mixers.gated_deltanet.conv_kernel model.mixers.gated_deltanet.chunk_size model.mixers.gated_deltanet.num_heads
model.mixers.gated_deltanet.head_dim model.mixers.gated_deltanet.value_head_dim
model.mixers.gated_deltanet.num_key_heads model.mixers.gated_deltanet.allow_negative_eigenvalues
model.mixers.deltaproduct.conv_kernel model.mixers.deltaproduct.chunk_size model.mixers.deltaproduct.num_heads
model.mixers.deltaproduct.head_dim model.mixers.deltaproduct.value_head_dim model.mixers.deltaproduct.num_key_heads
model.mixers.deltaproduct.allow_negative_eigenvalues model.mixers.deltaproduct.num_steps
model.mixers.deltaproduct.decay
model.mixers.gla.conv_kernel model.mixers.gla.chunk_size model.mixers.gla.num_heads model.mixers.gla.head_dim
model.mixers.gla.value_head_dim model.mixers.gla.gate_rank
model.mixers.hgrn2.conv_kernel model.mixers.hgrn2.chunk_size model.mixers.hgrn2.num_heads model.mixers.hgrn2.head_dim
model.mixers.hgrn2.value_head_dim
model.mixers.hedgehog.conv_kernel model.mixers.hedgehog.chunk_size model.mixers.hedgehog.num_heads
model.mixers.hedgehog.head_dim model.mixers.hedgehog.value_head_dim
model.mixers.lightning.conv_kernel model.mixers.lightning.chunk_size model.mixers.lightning.num_heads
model.mixers.lightning.head_dim model.mixers.lightning.value_head_dim
model.mixers.lightnet.conv_kernel model.mixers.lightnet.chunk_size model.mixers.lightnet.num_heads
model.mixers.lightnet.head_dim model.mixers.lightnet.value_head_dim model.mixers.lightnet.gate_rank
model.mixers.mala.conv_kernel model.mixers.mala.chunk_size model.mixers.mala.num_heads model.mixers.mala.head_dim
model.mixers.mala.value_head_dim
model.mixers.mamba1.conv_kernel model.mixers.mamba1.chunk_size model.mixers.mamba1.inner_size
model.mixers.mamba1.state_size model.mixers.mamba1.dt_rank
model.mixers.mom.mixer model.mixers.mom.num_memories model.mixers.mom.top_k model.mixers.mom.shared_memory
model.mixers.mom.balance_loss_weight
model.mixers.plstm.conv_kernel model.mixers.plstm.chunk_size model.mixers.plstm.num_heads model.mixers.plstm.head_dim
model.mixers.plstm.value_head_dim
model.mixers.retnet.conv_kernel model.mixers.retnet.chunk_size model.mixers.retnet.num_heads
model.mixers.retnet.head_dim model.mixers.retnet.value_head_dim model.mixers.retnet.rope_theta
model.mixers.transnormer.conv_kernel model.mixers.transnormer.chunk_size model.mixers.transnormer.num_heads
model.mixers.transnormer.head_dim model.mixers.transnormer.value_head_dim
model.mixers.window.window model.mixers.window.num_heads model.mixers.window.num_kv_heads model.mixers.window.head_dim
model.mixers.window.qk_norm model.mixers.window.positions model.mixers.window.rope_theta
model.mixers.window.gate
model.multipliers.embedding model.multipliers.residual model.multipliers.logits
data.store data.validation_fraction data.packing data.shuffle data.mask_document_boundaries data.num_workers
data.on_corruption
data.cache.folder data.cache.max_bytes data.cache.block_bytes
data.sources.*.name data.sources.*.paths data.sources.*.text_column data.sources.*.weight data.sources.*.max_bytes
data.sources.*.filters.min_characters data.sources.*.filters.max_characters data.sources.*.filters.keep_pattern
data.sources.*.filters.drop_pattern data.sources.*.filters.exact_duplicates
data.probe.task data.probe.num_pairs data.probe.num_writes data.probe.num_keys data.probe.num_values
data.probe.num_copied data.probe.num_symbols
data.tokenizer.model data.tokenizer.eos_token data.tokenizer.algorithm data.tokenizer.vocab_size
data.tokenizer.byte_fallback data.tokenizer.training_bytes
data.prepare.preset data.prepare.num_actors data.prepare.part_bytes data.prepare.chunk_tokens data.prepare.seed
data.phases.*.start_sample data.phases.*.weights data.phases.*.sequence_length
train.steps train.stop_after_steps train.sequence_length train.micro_batch_size train.global_batch_size train.seed
train.precision train.checkpoint_every_steps train.checkpoint_in_background train.keep_last train.keep_every_steps
train.validate_every_steps train.validation_batches
train.log_every_steps train.timeout_seconds train.max_skipped_steps train.compile train.recompute
train.recompute_blocks train.num_threads
train.batch_ramp.start_size train.batch_ramp.increment train.batch_ramp.steps
optimizer.learning_rate optimizer.beta1 optimizer.beta2 optimizer.epsilon optimizer.weight_decay
optimizer.clip_grad_norm
schedule.kind schedule.warmup_steps schedule.decay_steps schedule.decay_shape schedule.min_ratio
stages.*.name stages.*.tokens stages.*.steps stages.*.sequence_length stages.*.micro_batch_size
stages.*.global_batch_size stages.*.weights stages.*.learning_rate
stages.*.rope.theta stages.*.rope.fraction stages.*.rope.scaling stages.*.rope.ntk_alpha stages.*.rope.yarn_factor
stages.*.rope.yarn_original_length stages.*.rope.yarn_beta_fast stages.*.rope.yarn_beta_slow
stages.*.schedule.kind stages.*.schedule.warmup_steps stages.*.schedule.decay_steps stages.*.schedule.decay_shape
stages.*.schedule.min_ratio
parallel.tensor parallel.sequence_parallel parallel.expert parallel.expert_tensor parallel.context parallel.pipeline
parallel.schedule parallel.virtual_stages parallel.zero_stage parallel.offload_optimizer
health.on_nonfinite health.on_spike health.spike_ratio health.spike_window health.max_rollbacks
health.straggler_percent
kernels.backend
export.target
launch.heartbeat_seconds launch.max_restarts launch.min_nodes launch.node_wait_seconds launch.setup
launch.slurm.partition launch.slurm.account launch.slurm.qos launch.slurm.time_limit launch.slurm.gpus
launch.slurm.cpus_per_task launch.slurm.signal_seconds launch.slurm.requeue launch.slurm.container_image
launch.slurm.container_mounts launch.slurm.extra
"""


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_field_list_is_frozen():
    assert [row.key for row in describe_fields()] == FIELDS.split()


def test_every_field_says_what_it_means():
    assert [row.key for row in describe_fields() if not row.meaning.endswith((".", ")"))] == []


def test_the_reference_page_is_fresh():
    page = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert page.read_text() == reference_page(), "run: make docs"


def test_the_schema_for_editors_is_fresh():
    schema = Path(__file__).parents[3] / "configs" / "schema.json"
    assert json.loads(schema.read_text()) == config_schema(), "run: make docs"


def test_numbers_of_exponent_form_need_no_dot(base):
    config = load_config(base)
    assert config.optimizer.learning_rate == 1e-3
    assert config.train.steps == 100
    assert type(config.train.steps) is int


def test_words_that_older_yaml_takes_for_booleans_are_text(base):
    assert load_config(base, ["run.name=no"]).run.name == "no"
    assert load_config(base, ["run.name=2026-01-01"]).run.name == "2026-01-01"


def test_overrides_reach_nested_sections_lists_and_absent_sections(base):
    config = load_config(
        base,
        [
            *("train.steps=20", "data.sources.0.weight=2", "optimizer.clip_grad_norm=null"),
            *("model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.expert_hidden_size=32"),
            "data.sources.0.paths=[a.txt, b.txt]",
        ],
    )
    assert config.train.steps == 20
    assert config.data.sources[0].weight == 2
    assert config.data.sources[0].paths == ("a.txt", "b.txt")
    assert config.model.moe is not None
    assert config.model.moe.top_k == 2
    assert config.optimizer.clip_grad_norm is None


def test_the_later_override_wins(base):
    assert load_config(base, ["train.steps=20", "train.steps=30"]).train.steps == 30


def test_extends_merges_sections_replaces_lists_and_chains(base, tmp_path):
    (tmp_path / "sub").mkdir()
    written(tmp_path / "sub", "extends: ../base.yaml\ntrain: {steps: 7, seed: 3}\n", "middle.yaml")
    top = written(
        tmp_path,
        "extends: sub/middle.yaml\ntrain: {steps: 9}\ndata: {sources: [{name: a, paths: [a]}, {name: b, paths: [b]}]}\n",
    )
    config = load_config(top)
    assert (config.train.steps, config.train.seed, config.train.sequence_length) == (9, 3, 128)
    assert [source.name for source in config.data.sources] == ["a", "b"]
    assert config.data.store == "data/small"


def test_null_removes_an_optional_section(base, tmp_path):
    top = written(tmp_path, "extends: base.yaml\nmodel: {feed_forward: null, pattern: M*}\n")
    assert load_config(top).model.feed_forward is None


def test_resolved_yaml_reads_back_equal(base, tmp_path):
    config = load_config(base, ["run.name=no", "optimizer.epsilon=1e-8", "model.norm_epsilon=1e-6"])
    assert load_config(written(tmp_path, resolved_yaml(config))) == config


def test_a_typo_names_the_nearest_key_with_file_and_line(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\ntrain:\n  stepz: 20\n")
    assert message_of(path) == f"{path}:3: train.stepz = 20: unknown key; did you mean train.steps?"


def test_a_key_of_another_section_is_sent_there(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\nsteps: 20\n")
    places = "train.steps or train.batch_ramp.steps or stages.*.steps"
    assert message_of(path) == f"{path}:2: steps = 20: unknown key; it belongs elsewhere: {places}"


def test_an_unlike_key_lists_the_known_ones(base):
    message = message_of(base, "kernels.zebra=1")
    assert message == "override kernels.zebra=1: unknown key; known keys here: backend"


def test_a_dotted_key_in_a_file_is_told_to_nest(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\ntrain.steps: 20\n")
    assert "train.steps = 20: unknown key; nest it" in message_of(path)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ('train.steps="20"', "must be a whole number; write it without quotes"),
        ("train.steps=20.5", "must be a whole number"),
        ("train.steps=true", "must be a whole number"),
        ("train.compile=1", "must be true or false; write `true` or `false`"),
        ("optimizer.learning_rate=fast", "must be a number; write it as a plain number such as 0.001 or 1e-3"),
        ("run.dir=20", "must be text; put it in quotes"),
        ("data.sources=plays", "must be a list; write `[a, b]`"),
        ("data.phases=[{start_sample: 1, weights: 3}]", "must be a mapping; write `{name: value}`"),
        ("train=5", "must be a section with keys"),
        ("train.keep_last=1", "must be at least 2; raise it"),
        ("optimizer.beta1=1", "must be less than 1; lower it"),
        ("optimizer.learning_rate=0", "must be greater than 0; raise it"),
        ("model.mamba.conv_kernel=5", "must be at most 4; lower it"),
        ("data.sources.0.paths=[]", "must have at least 1 item(s); add one"),
        ("data.sources.0.name=a b", "must match ^[A-Za-z0-9_.-]+$; use only those characters"),
        ("model.pattern=''", "must have at least 1 character(s); fill it in"),
        ("optimizer.learning_rate=.nan", "must be"),
    ],
)
def test_a_value_of_the_wrong_kind_names_rule_and_remedy(base, override, rule):
    message = message_of(base, override)
    assert message.startswith(f"override {override}: ")
    assert rule in message
    assert "\n" not in message


def test_a_wrong_choice_lists_the_allowed_and_the_nearest(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\ntrain:\n  precision: bf61\n")
    assert message_of(path) == f'{path}:3: train.precision = "bf61": must be one of: float32, bf16; use bf16'
    assert "must be one of: 0, 1, 2, 3" in message_of(base, "parallel.zero_stage=4")


def test_a_missing_section_says_what_it_needs(tmp_path):
    path = written(tmp_path, BASE.split("optimizer:", maxsplit=1)[0])
    expected = f"{path}:1: optimizer: is missing; add `optimizer:`, a section with at least learning_rate"
    assert message_of(path) == expected


def test_a_missing_key_says_what_it_means(base, tmp_path):
    path = written(tmp_path, BASE.replace("  hidden_size: 64\n", ""))
    message = message_of(path)
    assert message == (
        f"{path}:3: model.hidden_size: is missing and has no default; add `hidden_size:` (Width of the residual stream)"
    )


def test_a_duplicate_key_names_both_lines(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\ntrain:\n  steps: 20\n  seed: 1\n  steps: 30\n")
    expected = f"{path}:5: train.steps: the key occurs twice (first on line 3); keep one of the two"
    assert message_of(path) == expected


def test_a_circle_of_extends_is_refused(tmp_path):
    written(tmp_path, "extends: b.yaml\n", "a.yaml")
    written(tmp_path, "extends: a.yaml\n", "b.yaml")
    message = message_of(tmp_path / "a.yaml")
    assert "files extend each other in a circle: a.yaml -> b.yaml -> a.yaml; remove one `extends`" in message
    assert message.startswith(f"{tmp_path / 'b.yaml'}:1: ")


def test_an_absent_parent_names_the_line_that_asks_for_it(tmp_path):
    path = written(tmp_path, "extends: nowhere.yaml\n")
    message = message_of(path)
    assert message.startswith(f"{path}:1: extends = nowhere.yaml: ")
    assert "nowhere.yaml does not exist; name a file relative to the one that extends it" in message


def test_extends_of_a_list_is_refused(tmp_path):
    assert "must be the path of one YAML file" in message_of(written(tmp_path, "extends: [a.yaml]\n"))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist; name an existing YAML file"):
        load_config(tmp_path / "none.yaml")


def test_broken_yaml_names_the_line(tmp_path):
    path = written(tmp_path, "run:\n  dir: [a\ntrain: 3\n")
    message = message_of(path)
    assert message.startswith(f"{path}:3: not valid YAML (")
    assert "check the indentation" in message


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert message_of(path) == f"{path}: not UTF-8 text (byte 0); save the file as UTF-8"


def test_an_empty_file_lists_every_missing_section(tmp_path):
    message = message_of(written(tmp_path, ""))
    assert message.startswith("5 problems in the configuration:")
    for section in ("run", "model", "data", "train", "optimizer"):
        assert f"{section}: is missing; add `{section}:`" in message


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("train.steps", "not an override; write key.key=value, such as train.steps=20"),
        ("--train.steps=2", "not an override"),
        ("data.sources.3.weight=2", "data.sources is a list of 1, so 3 is not a position in it"),
        ("data.sources.first.weight=2", "so first is not a position in it"),
        ("data.store.x=1", 'data.store is the value "data/small", not a section; override data.store itself'),
        ("data.sources.0.paths=[a", "not valid YAML"),
    ],
)
def test_a_bad_override_is_explained(base, override, rule):
    message = message_of(base, override)
    assert override in message
    assert rule in message


def test_all_problems_come_in_one_message_each_with_its_place(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\ntrain:\n  stepz: 20\n  keep_last: 1\n  seed: 1\n  seed: 2\n")
    message = message_of(path, "train.precision=fp8")
    lines = message.splitlines()
    assert lines[0] == "4 problems in the configuration:"
    assert [line.split(": ")[0].strip() for line in lines[1:]].count(f"{path}:3") == 1
    assert any(line.startswith(f"  {path}:6: train.seed") for line in lines)
    assert any(line.startswith("  override train.precision=fp8: must be one of") for line in lines)


def test_a_problem_of_the_parent_file_names_the_parent(base, tmp_path):
    base.write_text(BASE.replace("steps: 1e2", "steps: soon"))
    message = message_of(written(tmp_path, "extends: base.yaml\n"))
    assert message.startswith(f"{base}:{BASE[: BASE.index('steps')].count(chr(10)) + 1}: train.steps = ")


def test_differences_name_key_and_both_values(base):
    first = load_config(base)
    second = load_config(base, ["train.steps=20", "model.feed_forward=null"])
    found = {item.key: (item.first, item.second) for item in diff_configs(first, second)}
    assert found["train.steps"] == (100, 20)
    assert found["model.feed_forward.hidden_size"] == (128, "(absent)")
    assert diff_configs(first, load_config(base)) == []


def test_the_schema_accepts_partial_files_and_knows_every_section():
    schema = config_schema()
    assert "required" not in schema
    assert set(schema["properties"]) == {"extends", *RunConfig.model_fields}
    assert schema["$defs"]["TrainConfig"]["properties"]["precision"]["enum"] == ["float32", "bf16"]


def test_an_override_may_be_a_pattern_of_mixers_in_braces(base):
    config = load_config(base, ["model.pattern={retnet}*", "model.mixers.retnet={num_heads: 4, head_dim: 8}"])
    assert config.model.pattern == "{retnet}*"
    assert config.model.mixers.retnet.num_heads == 4
