"""Runs with multi-token prediction: what they log, how they resume, which weights they begin with, what is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.inference.weights import load_initial_weights, read_weights, write_weights
from amfm.pretrain.train import train
from tests.pretrain.export.exported_models import random_weights
from tests.pretrain.test_micro_batch import make_batch
from tests.pretrain.tiny_run import MODEL, read_events, read_metrics, tiny_config, train_and_collect

SMALL = {**MODEL, "hidden_size": 16}
# What else a resumed run must continue with bitwise: gates, Kimi Delta Attention and latent attention.
GATED = {
    **SMALL,
    "pattern": "K+*/*E/*E",
    "mtp": {"shared": True},
    "attention": {**MODEL["attention"], "gate": "element"},
    "mixers": {
        "kda": {"num_heads": 2, "head_dim": 4, "chunk_size": 16},
        "mla": {
            "num_heads": 2,
            "latent_size": 8,
            "nope_head_dim": 4,
            "rope_head_dim": 4,
            "value_head_dim": 4,
            "gate": "head",
        },
    },
}
DEEP = {**SMALL, "pattern": "M*/*E/*E", "mtp": {"shared": True}}


def deep_config(data: DataConfig, run_dir: Path, model=DEEP, **overrides):
    tree = tiny_config(data, run_dir, **overrides).model_dump(mode="json") | {"model": model}
    return type(tiny_config(data, run_dir)).model_validate(tree)


def test_a_run_logs_each_depth_and_resumes_to_the_bit(data: DataConfig, tmp_path: Path) -> None:
    settings = {"train__validate_every_steps": 4, "train__checkpoint_every_steps": 2, "data__validation_fraction": 0.2}
    straight = train_and_collect(deep_config(data, tmp_path / "straight", GATED, **settings))
    losses = straight.series("mtp_loss")
    assert all(len(step) == 2 and all(5 < loss < 7 for loss in step) for step in losses)
    accepted = straight.metrics[-1]["mtp_accepted"]
    assert len(accepted) == 2 and all(0 <= part <= 1 for part in accepted)
    assert read_events(tmp_path / "straight", "validation")[-1]["mtp_accepted"] == accepted
    assert train(deep_config(data, tmp_path / "cut", GATED, train__stop_after_steps=2, **settings)) == 0
    resumed = train_and_collect(deep_config(data, tmp_path / "cut", GATED, **settings))
    assert resumed.series("mtp_loss") == losses and resumed.series("loss") == straight.series("loss")
    assert all(torch.equal(value, straight.weights[name]) for name, value in resumed.weights.items())


def test_weights_with_and_without_depths_begin_a_run(data: DataConfig, tmp_path: Path) -> None:
    for name, model in (("plain", {**SMALL, "pattern": "M*"}), ("deep", DEEP)):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, random_weights(data, model))
    deep, plain = (read_weights(tmp_path / name) for name in ("deep", "plain"))
    identity = deep.tokenizer_identity()

    def begin(fields, source):
        model = HybridModel(ModelConfig.model_validate(fields), single_rank_groups(), seed=9)
        fresh = {name: value.clone() for name, value in model.state_dict().items()}
        return load_initial_weights(model, tmp_path / source, identity), model.state_dict(), fresh

    remarks, state, _ = begin(DEEP, "deep")
    assert remarks == [] and all(torch.equal(state[name], value) for name, value in deep.state.items())
    remarks, state, fresh = begin(DEEP, "plain")
    assert len(remarks) == 1 and "no MTP layers /*E as here: they begin at random" in remarks[0]
    assert all(torch.equal(state[name], plain.state.get(name, fresh[name])) for name in state)
    remarks, state, _ = begin({**SMALL, "pattern": "M*"}, "deep")
    assert len(remarks) == 1 and "its MTP layers /*E are ignored" in remarks[0]
    assert all(torch.equal(value, deep.state[name]) for name, value in state.items())


def test_the_log_says_that_depths_begin_at_random(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write_weights(tmp_path / "plain", random_weights(data, {**SMALL, "pattern": "M*"}))
    config = deep_config(data, tmp_path / "run", train__stop_after_steps=1)
    assert (
        train(
            config.model_copy(
                update={"run": config.run.model_copy(update={"initial_weights": str(tmp_path / "plain")})}
            )
        )
        == 0
    )
    assert "begin at random" in read_events(tmp_path / "run", "initial_weights")[0]["text"]
    assert len(read_metrics(tmp_path / "run")[0]["mtp_loss"]) == 2


def test_context_ranks_cut_what_was_shifted_on_whole_rows() -> None:
    from amfm.pretrain.micro_batch import MicroBatch, shift_batch

    batch = make_batch([[0, 5, 13], [0]])
    whole = shift_batch(batch, 2)
    for rank in range(2):
        own = MicroBatch.from_batch(batch, rank, 2, 2)
        places = [*range(6 * rank, 6 * rank + 6), *range(18 - 6 * rank, 24 - 6 * rank)]
        for given, expected in zip(own.ahead, whole, strict=True):
            assert torch.equal(given.tokens_BT, expected.tokens_BT[:, places])
            assert torch.equal(given.labels_BT, expected.labels_BT[:, places])


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"pattern": "M*/*E/*E"}, {"train__sequence_length": 2}, "need sequences of at least 3 tokens, not 2"),
        (
            {"pattern": "M|*/*E"},
            {"parallel__pipeline": 2, "parallel__schedule": "zero_bubble"},
            "cuts backward passes in two at the stage's input",
        ),
        (
            {"pattern": "M*/*"},
            {"data__synthetic": {"task": "parity"}},
            "labels of data.synthetic are not the next tokens",
        ),
        ({"pattern": "M*", "mtp": {"loss_weight": 0.1}}, {}, "has no MTP layer that reads it"),
        (
            {"pattern": "M*/*", "mup": {"base_hidden_size": 8}},
            {},
            "model.mup was not shown to hold for the MTP layers",
        ),
        ({"pattern": "M*/*|E"}, {}, "an MTP layer stays with the last stage"),
    ],
)
def test_what_depths_cannot_do_is_refused_by_name(data, tmp_path, model, settings, message) -> None:
    tree = tiny_config(data, tmp_path / "run", **settings).model_dump(mode="json")
    config = type(tiny_config(data, tmp_path)).model_validate(tree | {"model": SMALL | {"vocab_size": 448} | model})
    with pytest.raises(ConfigError, match="(?s).*" + message.replace(".", r"\.")):
        check_run(config)
