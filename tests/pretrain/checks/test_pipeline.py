"""Rules of a pipeline: each rejection names value, rule and fix."""

import pytest

from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.file import load_config
from tests.pretrain.checks.test_check_run import broken


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.pattern=M*", "parallel.pipeline=3"],
            "parallel.pipeline x parallel.virtual_stages = 3 pieces need a block each, and model.pattern has 2; use at",
        ),
        (
            ["model.pattern=M|*|M*", "parallel.pipeline=2"],
            "model.pattern has 2 '|' and so 3 parts, where parallel.pipeline x parallel.virtual_stages = 2 are needed; "
            "put 1 '|', or none to have it balanced",
        ),
        (
            [
                "model.pattern=MM*M",
                "parallel.pipeline=2",
                "parallel.schedule=interleaved",
                "parallel.virtual_stages=3",
            ],
            "parallel.pipeline x parallel.virtual_stages = 6 pieces need a block each, and model.pattern has 4; use at",
        ),
        (
            ["parallel.pipeline=2", "parallel.schedule=zero_bubble", "train.compile=true"],
            "train.compile = true: does not go with parallel.schedule=zero_bubble, which cuts backward passes in two: "
            "compiled blocks have one; use false, or another schedule",
        ),
    ],
)
def test_a_broken_rule_names_value_rule_and_remedy(base, overrides, message):
    assert message in broken(base, *overrides)


@pytest.mark.parametrize(
    ("batch", "schedule", "message"),
    [
        (
            4,
            "1f1b",
            "train.global_batch_size = 4: gives each data rank 1 micro-batch, and parallel.schedule=1f1b needs at least "
            "parallel.pipeline=2 to fill the pipeline; use 8 or more, or a smaller train.micro_batch_size",
        ),
        (
            4,
            "zero_bubble",
            "train.global_batch_size = 4: gives each data rank 1 micro-batch, and parallel.schedule=zero_bubble takes them "
            "in rounds of parallel.pipeline=2; use 8",
        ),
        (
            20,
            "zero_bubble",
            "train.global_batch_size = 20: gives each data rank 5 micro-batches, and parallel.schedule=zero_bubble takes "
            "them in rounds of parallel.pipeline=2; use 16 or 24",
        ),
        (
            6,
            "1f1b",
            "train.global_batch_size = 6: must be a multiple of train.micro_batch_size=2 x 2 data ranks = 4; use 4 or 8",
        ),
    ],
)
def test_micro_batches_that_a_schedule_cannot_take_are_refused_with_the_nearest_size(base, batch, schedule, message):
    overrides = ["parallel.pipeline=2", f"parallel.schedule={schedule}", "train.micro_batch_size=2"]
    assert broken(base, *overrides, f"train.global_batch_size={batch}", world_size=4) == message


@pytest.mark.parametrize(("batch", "schedule"), [(20, "1f1b"), (24, "zero_bubble")])
def test_what_the_rule_offers_is_taken(base, batch, schedule):
    overrides = ["parallel.pipeline=2", f"parallel.schedule={schedule}", "train.micro_batch_size=2"]
    check_run(load_config(base, [*overrides, f"train.global_batch_size={batch}"]), 4)


@pytest.mark.parametrize(
    ("schedule", "ramp", "message"),
    [
        (
            "1f1b",
            "{start_size: 4, increment: 4, steps: 10}",
            "train.batch_ramp.start_size = 4: gives each data rank 1 micro-batch, and parallel.schedule=1f1b needs at least",
        ),
        (
            "zero_bubble",
            "{start_size: 8, increment: 4, steps: 10}",
            "train.batch_ramp.increment = 4: gives each data rank 1 micro-batch, and parallel.schedule=zero_bubble takes",
        ),
    ],
)
def test_every_batch_of_a_ramp_fills_the_pipeline(base, schedule, ramp, message):
    overrides = ["parallel.pipeline=2", f"parallel.schedule={schedule}", "train.micro_batch_size=2"]
    overrides += ["train.global_batch_size=16", f"train.batch_ramp={ramp}"]
    assert message in broken(base, *overrides, world_size=4)
