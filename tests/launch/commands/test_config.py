"""`amfm config`: the resolved file, its problems with file and line, differences, the schema."""

from amfm.launch.cli import run
from tests.helpers.json_output import one_object
from tests.pretrain.config.files import BASE


def test_config_prints_the_resolved_file(base, capsys, tmp_path):
    assert run(["config", str(base), "train.steps=20"]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert run(["config", str(resolved), "--json"]) == 0
    assert one_object(capsys.readouterr().out)["train"]["steps"] == 20


def test_config_names_each_problem_with_file_and_line(base, capsys):
    base.write_text(BASE.replace("steps: 1e2", "steps: 0\n  keep_lst: 3"))
    assert run(["config", str(base)]) == 2
    captured = capsys.readouterr()
    number = BASE[: BASE.index("steps")].count("\n") + 1
    assert f"{base}:{number}: train.steps = 0: must be greater than 0" in captured.err
    assert f"{base}:{number + 1}: train.keep_lst = 3: unknown key; did you mean train.keep_last?" in captured.err
    assert captured.out == ""


def test_config_checks_rules_across_sections(base, capsys):
    assert run(["config", str(base), "--ranks", "3"]) == 2
    assert "must be a multiple of train.micro_batch_size=2 x 3 data ranks = 6; use 6" in capsys.readouterr().err


def test_config_shows_differences(base, capsys):
    assert run(["config", str(base), "train.steps=20", "--diff", str(base), "--json"]) == 0
    assert one_object(capsys.readouterr().out) == {"train.steps": {"other": 100, "this": 20}}


def test_config_prints_the_schema_and_the_fields(capsys):
    assert run(["config", "--schema"]) == 0
    assert "extends" in one_object(capsys.readouterr().out)["properties"]
    assert run(["config", "--fields", "--json"]) == 0
    assert one_object(capsys.readouterr().out)["train.seed"]["default"] == "0"


def test_config_without_a_file_says_what_to_give(capsys):
    assert run(["config"]) == 2
    assert "no CONFIG.yaml given; name a file" in capsys.readouterr().err
