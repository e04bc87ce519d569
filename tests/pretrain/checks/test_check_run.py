"""Rules across sections: each broken one names value, rule and fix, and the line where the value stands."""

from pathlib import Path

import pytest

from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_config
from tests.pretrain.config.files import BASE


def broken(base: Path, *overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_run(load_config(base, overrides), world_size)
    return str(caught.value)


def test_a_sound_run_passes(base):
    check_run(load_config(base), 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.vocab_size=300"],
            "model.vocab_size = 300: must be at least data.tokenizer.vocab_size=512; use 512 or",
        ),
        (
            ["data.tokenizer.eos_token=<end>"],
            "data.tokenizer.eos_token = <end>: is of a tokenizer file, and data.tokenizer.model names none; name the file",
        ),
        (["run.dir=data/small"], "run.dir = data/small: is the folder of data.store too; use two folders"),
        (
            ["data.sources=[{name: a, paths: [a]}, {name: a, paths: [b]}]"],
            "data.sources.1.name = a: is also the name of data.sources.0; give each source its own name",
        ),
        (
            ["data.phases=[{start_sample: 9, weights: {novels: 1}}]"],
            "data.phases.0.weights.novels: is not a name of data.sources; use one of plays",
        ),
        (
            ["data.sources.0.weight=0"],
            "data.sources: have no weight above 0; give a weight to what the run begins with",
        ),
        (["data.cache.max_bytes=5"], "data.cache: has no effect: data.store is a folder; remove it, or name a URL"),
        (["data.phases=[{start_sample: 9}]"], "data.phases.0: changes nothing; give it weights or a sequence_length"),
        (
            ["data.phases=[{start_sample: 9, sequence_length: 64}]"],
            "data.phases.0.start_sample = 9: must be a multiple of train.global_batch_size=",
        ),
        (
            [
                "train.global_batch_size=8",
                "train.micro_batch_size=2",
                "train.batch_ramp={start_size: 4, increment: 4, steps: 3}",
                "data.phases=[{start_sample: 16, sequence_length: 64}]",
            ],
            "data.phases.0.start_sample = 16: must be the first sample of a step, and step 4 of the batch ramp has 4 before "
            "it, because sequences change their length there; use 20",
        ),
        (
            ["data.phases=[{start_sample: 9, weights: {plays: 1}}, {start_sample: 9, weights: {plays: 2}}]"],
            "data.phases.1.start_sample = 9: must be greater than 9, where the phase before starts; put the phases in",
        ),
        (
            ["evaluate.every_steps=5"],
            "evaluate.every_steps: has no effect without evaluate.tasks; name tasks, or remove",
        ),
        (
            ["train.keep_every_steps=30", "train.checkpoint_every_steps=20"],
            "train.keep_every_steps = 30: must be a multiple of train.checkpoint_every_steps=20; use 40",
        ),
        (
            ["train.keep_every_steps=30"],
            "train.keep_every_steps = 30: must be a multiple of train.checkpoint_every_steps=null; set that first",
        ),
        (
            ["schedule.warmup_steps=100"],
            "schedule.warmup_steps = 100: must be less than train.steps=100; use for example 10, or raise train.steps",
        ),
        (
            ["schedule.warmup_steps=60", "schedule.decay_steps=50"],
            "schedule.decay_steps = 50: schedule.warmup_steps=60 and the decay must fit into train.steps=100; "
            "use at most 40",
        ),
        (
            ["schedule.kind=cosine", "schedule.decay_steps=5"],
            "schedule.decay_steps = 5: has no effect with schedule.kind=cosine; remove it, or use schedule.kind=wsd",
        ),
        (
            ["schedule.warmup_steps=60", "schedule.decay_steps=50", "schedule.decay_end_step=105"],
            "schedule.decay_steps = 50: schedule.warmup_steps=60 and the decay must fit into schedule.decay_end_step=105; "
            "use at most 45",
        ),
        (
            ["schedule.kind=cosine", "schedule.warmup_steps=20", "schedule.decay_end_step=20"],
            "schedule.decay_end_step = 20: must be above schedule.warmup_steps=20; raise it, or remove it",
        ),
        (
            ["schedule.kind=constant", "schedule.decay_end_step=80"],
            "schedule.decay_end_step = 80: has no effect with schedule.kind=constant; remove it",
        ),
        (
            ["schedule.kind=constant", "schedule.decay_shape=sqrt"],
            "schedule.decay_shape = sqrt: has no effect with schedule.kind=constant; remove it",
        ),
        (
            ["train.stop_after_steps=101"],
            "train.stop_after_steps = 101: is beyond train.steps=100; lower it, or remove it",
        ),
        (
            ["train.validate_every_steps=5", "data.validation_fraction=0"],
            "train.validate_every_steps = 5: needs documents kept for validation, and data.validation_fraction is 0; "
            "set for example data.validation_fraction=0.02",
        ),
        (
            ["train.compile=true", "kernels.backend=reference"],
            "train.compile = true: cannot speed up kernels.backend=reference",
        ),
        (
            ["model.pattern=ME", "model.moe={num_experts: 4, top_k: 1, expert_hidden_size: 8}"],
            "model.moe.top_k = 1: gives the one chosen expert the weight 1, with normalize_probabilities: the router gets "
            "no gradient of the loss; use normalize_probabilities: false, or top_k of 2 or more",
        ),
        (
            ["train.recompute=full", "train.recompute_blocks=M"],
            "train.recompute_blocks = M: has no effect with train.recompute=full; remove it",
        ),
        (
            ["train.recompute=selective"],
            "train.recompute = selective: needs letters in train.recompute_blocks; name some of ",
        ),
        (
            ["train.recompute=selective", "train.recompute_blocks=ME"],
            "train.recompute_blocks = ME: names E, and model.pattern has no such block; use some of ",
        ),
        (
            ["train.recompute=selective", "train.recompute_blocks=MZ"],
            "train.recompute_blocks = MZ: 'Z' is not a letter of a block; use some of M Mamba2, * or A attention",
        ),
        (
            [
                "train.recompute=full",
                "parallel.pipeline=2",
                "parallel.schedule=zero_bubble",
                "parallel.virtual_stages=2",
            ],
            "train.recompute = full: does not go with parallel.schedule=zero_bubble",
        ),
        (
            ["model.mamba.num_groups=3"],
            "model.mamba.num_groups=3 must divide model.mamba.num_heads=4; use one of 1, 2, 4",
        ),
        (["model.attention.num_kv_heads=3"], "model.attention.num_kv_heads=3 must divide model.attention.num_heads=4"),
        (["model.pattern=ME"], "model.moe is missing; add model.moe"),
        (["model.pattern=MQ"], "model.pattern"),
        (
            ["model.attention.qk_norm=true", "export.target=nemotron_h"],
            "export.target=nemotron_h cannot hold this model: model.attention.qk_norm=true",
        ),
    ],
)
def test_a_broken_rule_names_value_rule_and_remedy(base, overrides, message):
    assert message in broken(base, *overrides)


def test_a_batch_that_ranks_cannot_share_names_the_nearest_sizes(base):
    message = broken(base, "train.global_batch_size=10", world_size=4)
    assert message == (
        "train.global_batch_size = 10: must be a multiple of train.micro_batch_size=2 x 4 data ranks = 8; use 8 or 16"
    )
    assert broken(base, "train.global_batch_size=1", world_size=1).endswith("x 1 data rank = 2; use 2")


def test_without_a_world_size_the_batch_need_only_be_whole_micro_batches(base):
    check_run(load_config(base, ["train.global_batch_size=6"]), None)
    message = broken(base, "train.global_batch_size=3")
    assert message.endswith("must be a multiple of train.micro_batch_size=2, for any number of ranks; use 2 or 4")


def test_a_tokenizer_file_is_not_measured_by_the_size_to_train(base):
    check_run(load_config(base, ["model.vocab_size=300", "data.tokenizer.model=my.model"]), 1)


def test_all_broken_rules_come_together_with_their_lines(base):
    with pytest.raises(ConfigError) as caught:
        load_checked(base, ["train.stop_after_steps=200", "model.mamba.num_groups=3"], world_size=3)
    message = str(caught.value)
    line = BASE[: BASE.index("global_batch_size")].count("\n") + 1
    assert message.startswith("3 problems in the configuration:")
    assert "  override model.mamba.num_groups=3: model.mamba.num_groups=3 must divide" in message
    assert "  override train.stop_after_steps=200: is beyond train.steps=100" in message
    assert f"  {base}:{line}: train.global_batch_size = 4: must be a multiple of" in message
