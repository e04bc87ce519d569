"""Each mistake in a configuration is explained where it was made."""

import pytest

from amfm.pretrain.config.file import load_config
from tests.pretrain.config.files import BASE, message_of, written


def test_a_typo_names_the_nearest_key_with_file_and_line(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\ntrain:\n  stepz: 20\n")
    assert message_of(path) == f"{path}:3: train.stepz = 20: unknown key; did you mean train.steps?"


def test_a_key_of_another_section_is_sent_there(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\nsteps: 20\n")
    places = (
        "data.sources.*.steps or train.steps or train.batch_ramp.steps or train.profile.steps or stages.*.steps or "
    )
    places += "convert.transfer.steps or convert.tune.steps"
    assert message_of(path) == f"{path}:2: steps = 20: unknown key; it belongs elsewhere: {places}"


def test_a_word_of_another_program_is_sent_to_ours(base):
    assert "it is model.feed_forward here" in message_of(base, "model.mlp=1")
    assert "it is train.profile.steps: [5] here" in message_of(base, "train.profile.start_step=5")


def test_an_unlike_key_lists_the_known_ones(base):
    message = message_of(base, "kernels.zebra=1")
    assert message == "override kernels.zebra=1: unknown key; known keys here: backend, attention, experts"


def test_a_dotted_key_in_a_file_is_told_to_nest(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\ntrain.steps: 20\n")
    assert "train.steps = 20: unknown key; nest it" in message_of(path)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ('train.steps="20"', "must be an integer; write it without quotes"),
        ("train.steps=20.5", "must be an integer"),
        ("train.steps=true", "must be an integer"),
        ("train.compile=1", "must be true or false; write `true` or `false`"),
        ("optimizer.learning_rate=fast", "must be a number; write it as a plain number such as 0.001 or 1e-3"),
        ("run.dir=20", "must be text; put it in quotes"),
        ("model.pattern=", "has no value; give it one ("),
        ("data.sources=plays", "must be a list; write `[a, b]`"),
        ("data.phases=[{start_sample: 1, weights: 3}]", "must be a mapping; write `{name: value}`"),
        ("train=5", "must be a section with keys"),
        ("train.keep_last=1", "must be at least 2; raise it"),
        ("train.seed=1e30", "must be less than 9223372036854775808; lower it"),
        ("train.timeout_seconds=1e14", "must be at most 1e+09; lower it"),
        ("train.num_threads=60000", "must be at most 4096; lower it"),
        ("optimizer.learning_rate=.inf", "must be finite; write an ordinary number"),
        ("model.norm_epsilon=.nan", "must be finite; write an ordinary number"),
        ("data.validation_fraction=.nan", "must be finite; write an ordinary number"),
        ("optimizer.beta1=1", "must be less than 1; lower it"),
        ("optimizer.muon.momentum=1", "must be less than 1; lower it"),
        ("optimizer.muon.rounds=0", "must be greater than 0; raise it"),
        ("optimizer.learning_rate=0", "must be greater than 0; raise it"),
        ("model.mamba.conv_kernel=5", "must be at most 4; lower it"),
        ("data.sources.0.paths=[]", "must have at least 1 item(s); add one"),
        ("data.sources.0.name=a b", "must match ^[A-Za-z0-9_-][A-Za-z0-9_.-]*$; use only those characters"),
        ("model.pattern=''", "must have at least 1 character(s); fill it in"),
        ("train.steps=9e18", "must be at most 1000000000000; lower it"),
    ],
)
def test_a_value_of_the_wrong_kind_names_rule_and_remedy(base, override, rule):
    message = message_of(base, override)
    assert message.startswith(f"override {override}: ")
    assert rule in message
    assert "\n" not in message


def test_a_wrong_choice_lists_the_allowed_and_the_nearest(base, tmp_path):
    path = written(tmp_path, "extends: base.yaml\ntrain:\n  precision: bf61\n")
    assert message_of(path) == f'{path}:3: train.precision = "bf61": must be one of: auto, float32, bf16; use bf16'
    assert "must be one of: 0, 1, 2, 3" in message_of(base, "parallel.zero_stage=4")


def test_a_missing_section_says_what_it_needs(tmp_path):
    path = written(tmp_path, BASE.split("optimizer:", maxsplit=1)[0])
    expected = f"{path}:1: optimizer: is missing; add `optimizer:`, a section with at least learning_rate"
    assert message_of(path) == expected
    empty = message_of(written(tmp_path, ""))
    assert "data: is missing; add `data:`, a section with keys such as store, cache, sources\n" in empty


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
    assert "circular `extends`: a.yaml -> b.yaml -> a.yaml; remove one `extends`" in message
    assert message.startswith(f"{tmp_path / 'b.yaml'}:1: ")


def test_an_absent_parent_names_the_line_that_asks_for_it(tmp_path):
    path = written(tmp_path, "extends: nowhere.yaml\n")
    message = message_of(path)
    assert message.startswith(f"{path}:1: extends = nowhere.yaml: ")
    assert "nowhere.yaml does not exist; name a file relative to the one that extends it" in message


def test_a_folder_as_parent_is_called_a_folder(tmp_path):
    assert f"{tmp_path} is a folder; name a file" in message_of(written(tmp_path, "extends: .\n"))


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


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("run:\n  dir: a # there\n   name: b\n", 3, "indented otherwise than the lines that it belongs to"),
        ("train:\n  steps: 3\n    seed: 1\n", 3, "a colon if no key can be); indent the line as its neighbors are"),
        ("run:\n  dir: a\n name: b\n", 3, "indented otherwise than the lines that it belongs to"),
        ("run:\n  dir: a\ntrain:\n  steps 400\n  seed: 1\n", 4, "no `: ` between key and value); write `key: value`"),
        ("train:\n  seed: 1\n  steps:400\n\n  # a warning\n  keep_last: 2\n", 3, "no `: ` between key and value"),
        ("train\n  seed: 1\n", 1, "no `: ` between key and value"),
        ("run:\n\tdir: a\n", 2, "indented with a tab); use spaces"),
    ],
)
def test_a_wrong_indent_is_said_as_one(tmp_path, text, line, said):
    path = written(tmp_path, text)
    message = message_of(path)
    assert message.startswith(f"{path}:{line}: not valid YAML (") and said in message
    assert "<block" not in message


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


def test_a_setting_of_several_types_is_one_problem_that_names_them_all(base):
    message = message_of(base, "model.attention.qk_norm=3.5", "schedule.warmup_steps=soon")
    assert "model.attention.qk_norm=3.5: must be true | false or wide; RMSNorm over" in message
    assert "schedule.warmup_steps=soon: must be int or float or null; " in message
    assert message.count("must be") == 2
