"""The YAML loader: what it accepts, overrides, `extends`, and what differs between two files."""

import pytest

from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import diff_configs, load_config, resolved_yaml
from tests.pretrain.config.files import written


def test_numbers_of_exponent_form_need_no_dot(base):
    config = load_config(base)
    assert config.optimizer.learning_rate == 1e-3
    assert config.train.steps == 100
    assert type(config.train.steps) is int


def test_a_whole_number_with_a_point_is_one_and_a_rate_of_1_stays_a_float(base):
    config = load_config(base, ["train.steps=3000000.0", "optimizer.learning_rate=1.0"])
    assert type(config.train.steps) is int and config.train.steps == 3_000_000
    assert type(config.optimizer.learning_rate) is float
    with pytest.raises(ConfigError, match=r"train\.steps=2\.5: must be an integer"):
        load_config(base, ["train.steps=2.5"])


@pytest.mark.parametrize("pattern", ["**", "*-", "{retnet}*"])
def test_a_pattern_that_begins_as_no_text_of_yaml_is_an_override(base, pattern):
    assert load_config(base, [f"model.pattern={pattern}"]).model.pattern == pattern


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
    given = ["run.name=no", "run.dir=/l\u00e4ufe/\U0001f600", "optimizer.epsilon=1e-8", "model.norm_epsilon=1e-6"]
    config = load_config(base, given)
    assert load_config(written(tmp_path, resolved_yaml(config))) == config


def test_differences_name_key_and_both_values(base):
    first = load_config(base)
    second = load_config(base, ["train.steps=20", "model.feed_forward=null"])
    found = {item.key: (item.first, item.second) for item in diff_configs(first, second)}
    assert found["train.steps"] == (100, 20)
    assert found["model.feed_forward.hidden_size"] == (128, "(absent)")
    assert diff_configs(first, load_config(base)) == []


def test_an_override_may_be_a_pattern_of_mixers_in_braces(base):
    config = load_config(base, ["model.pattern={retnet}*", "model.mixers.retnet={num_heads: 4, head_dim: 8}"])
    assert config.model.pattern == "{retnet}*"
    assert config.model.mixers.retnet.num_heads == 4


def test_a_leading_tilde_is_the_home_folder(base, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(base, ["run.dir=~/runs/a", "data.store=~/store", "data.tokenizer.model=~/t.model"])
    assert (config.run.dir, config.data.store) == ("/home/me/runs/a", "/home/me/store")
    assert config.data.tokenizer.model == "/home/me/t.model"
    assert load_config(base, ["data.store=s3://bucket/~/a"]).data.store == "s3://bucket/~/a"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.vocab_size=1e9", "must be at most 10000000"),
        (f"model.hidden_size={10**30}", "must be at most 1000000"),
        ('run.dir="a\\nb"', "has a control character; use only printable characters"),
        ('data.sources.0.paths=["a\\tb"]', "has a control character"),
    ],
)
def test_sizes_that_cannot_be_and_control_characters_in_paths_are_refused(base, override, said):
    with pytest.raises(ConfigError, match=said):
        load_config(base, [override])
