"""`amfm init`: configurations that pass every check and fit by the plan, for every combination of flags."""

import itertools
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from amfm.launch.cli import run
from amfm.launch.init import write
from amfm.launch.init.machine import find_machine
from amfm.launch.init.shapes import SIZES, STYLES, model_section
from amfm.launch.init.text import describe_text
from amfm.launch.init.write import Answers, compose, cpu_seconds_per_token
from amfm.launch.plan.estimate import Assumptions
from amfm.launch.plan.plan import make_plan
from amfm.model.config.checks import check_model
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters, flops_per_token
from amfm.model.huggingface.classes import choose_target
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.file import load_config
from tests.terminal import CTRL_C, Terminal

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = {
    "20m": "ladder_20m",
    "150m": "ladder_150m",
    "1b": "ladder_1b_a300m",
    "8b": "ladder_8b_a1b",
    "30b": "nemotron3_nano_30b",
}
SAID = {"3m": 3e6, "20m": 20e6, "150m": 150e6, "1b": 1e9, "8b": 8e9, "30b": 30e9}
# What each size needs at least; a combination with less is rejected.
HARDWARE = {"3m": "cpu", "20m": "cpu", "150m": "1xh100", "1b": "1xh100", "8b": "8xh100", "30b": "64xh100"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chooser = random.Random(0)
    words = ["".join(chooser.choices("abcdefghiklmnoprstu", k=chooser.randint(2, 9))) for _ in range(2_000)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = (" ".join(chooser.choices(words, k=60)) for _ in range(800))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module", autouse=True)
def short_passes() -> Iterator[None]:
    """Time two passes of one row: what a processor is timed with to be told a user is eight times as much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "TIMED_TOKENS", 256)
        patch.setattr(write, "PASSES", 1)
        yield


@pytest.fixture(scope="module")
def for_a_cpu(short_passes: None, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest run, for this machine."""
    folder = tmp_path_factory.mktemp("cpu") / "run"
    assert call(folder, text, "3m", "nemotron", "cpu") == 0
    return folder / "run.yaml"


def call(folder: Path, text: Path, size: str, style: str, hardware: str) -> int:
    flags = {"--size": size, "--style": style, "--data": str(text), "--hardware": hardware}
    return run(["init", str(folder), *itertools.chain(*flags.items()), "--json"])


@pytest.mark.parametrize("size", PRESETS)
def test_nemotron_style_is_the_preset_of_its_size(size: str) -> None:
    made = ModelConfig.model_validate(model_section(size, "nemotron"))
    preset = load_config(CONFIGS / f"{PRESETS[size]}.yaml")
    # A preset keeps Mamba2's states where its own layout has the memory; what is made here may run anywhere.
    assert made.mamba is not None and preset.model.mamba is not None
    mamba = preset.model.mamba.model_copy(update={"keep_states": made.mamba.keep_states})
    # Its initial values are of the recipe that trained the released model.
    initial = {"initializer_range": made.initializer_range, "megatron_init": made.megatron_init}
    assert made == preset.model.model_copy(update={"mamba": mamba} | initial) and not made.mamba.keep_states
    row = SIZES[size]
    assert (row.sequence_length, row.global_batch_size) == (
        preset.train.sequence_length,
        preset.train.global_batch_size,
    )
    assert row.learning_rate == preset.optimizer.learning_rate


def test_granite_at_30b_is_the_published_model() -> None:
    made = ModelConfig.model_validate(model_section("30b", "granite"))
    preset = load_config(CONFIGS / "granite4_h_small.yaml").model
    assert made.parsed_pattern == preset.parsed_pattern
    assert count_parameters(made) == count_parameters(preset)


@pytest.mark.parametrize(("size", "style"), itertools.product(SIZES, STYLES))
def test_every_model_has_the_size_that_it_is_named_for(size: str, style: str) -> None:
    model = ModelConfig.model_validate(model_section(size, style))
    check_model(model)
    assert count_parameters(model).total == pytest.approx(SAID[size], rel=0.35)


def test_an_unknown_accelerator_is_named_by_the_option_that_was_given() -> None:
    with pytest.raises(ValueError, match=r"^--hardware 8xh10: h10 is not in the table .*; use h100"):
        find_machine("8xh10")


def test_a_config_passes_and_its_plan_fits(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_written(tmp_path / "new" / "folder", text, "1b", "granite", "1xh100", capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "style"), itertools.product(SIZES, STYLES))
@pytest.mark.parametrize("hardware", ["cpu", "1xh100", "8xh100", "64xh100"])
def test_every_combination_fits_or_is_refused_with_what_fits(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], size: str, style: str, hardware: str
) -> None:
    ranks = {"cpu": 0, "1xh100": 1, "8xh100": 8, "64xh100": 64}
    if ranks[hardware] >= ranks[HARDWARE[size]]:
        check_written(tmp_path / "run", text, size, style, hardware, capsys)
    elif (
        call(tmp_path / "run", text, size, style, hardware) == 2
    ):  # a large machine's CPU holds more than is asked here
        remedy = capsys.readouterr().err.rpartition("or --hardware ")[2].strip()
        check_written(tmp_path / "run", text, size, style, remedy, capsys)


EXPORTS = {"nemotron": "nemotron_h", "granite": "granitemoehybrid", "qwen3next": "qwen3_next", "turbos": "own"}


def check_written(
    folder: Path, text: Path, size: str, style: str, hardware: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, text, size, style, hardware) == 0, capsys.readouterr().err
    said = json.loads(capsys.readouterr().out)
    machine = find_machine(hardware)
    config = load_checked(said["config"], world_size=machine.ranks)
    assert config.export.target == "auto", "a changed pattern trains under the same file"
    assert choose_target(config.model) == EXPORTS[style]
    made = make_plan(config, machine.hardware, machine.ranks, Assumptions())
    assert made.is_own and made.own.fits(), made.own.reason
    head = Path(said["config"]).read_text().split("\n\n")[0]
    assert all(f"#   {command}" in head for command in said["next"])


def test_what_cannot_be_is_refused(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (("20m", "mamba", "cpu"), "--style mamba must be one of nemotron, granite, qwen3next, turbos"),
        (("2b", "granite", "cpu"), "--size 2b must be one of 3m, 20m, 150m, 1b, 8b, 30b"),
        (("20m", "granite", "h100"), "--hardware h100 must be cpu, or a number and an accelerator"),
        (("20m", "granite", "8xh1000"), "use h100"),
        (("8b", "granite", "1xh100"), "--size 8b does not fit --hardware 1xh100 (79.1 GiB per rank)"),
    ]
    for answers, message in cases:
        assert call(tmp_path / "run", text, *answers) == 2
        assert message in capsys.readouterr().err
    assert call(tmp_path / "run", tmp_path / "none", "20m", "granite", "cpu") == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing is written where something is rejected"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("mine")
    assert call(tmp_path / "run", text, "20m", "granite", "cpu") == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "run" / "run.yaml").read_text() == "mine"


def test_without_a_terminal_it_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(tmp_path / "run"), "--size", "20m", "--data", "text"]) == 2
    assert "--style is not given, and there is no terminal to ask at; add --style nemotron" in capsys.readouterr().err


def test_each_answer_is_judged_before_the_next_question(tmp_path: Path) -> None:
    terminal = Terminal("init", tmp_path / "run")
    answers = {
        "Size": "7b",
        "7b must be one of": "20M",
        "Style": "granit",
        "granit must": "",
        "Text": "",
        "needs an answer: name a file": tmp_path / "nowhere",
    }
    for question, answer in answers.items():
        terminal.expect(question)
        terminal.type(f"{answer}\n")
    terminal.expect("Text: a file", times=3)
    said = terminal.screen
    assert terminal.end(CTRL_C) == 130
    assert "7b must be one of 3m" in said and "granit must be one of nemotron" in said and "nowhere" in said
    assert "65.5M tokens in 2,000 steps of 64 x 512; planned for two CPU cores" in said
    assert said.count("Size of the model") == 2 and said.count("Style") == 2 and "--size" not in said


@pytest.mark.parametrize(
    ("documents", "letters", "fraction"),
    [
        (1, 40_000, 0.0),  # nothing to keep: a run that validated would be rejected
        (2, 40_000, 0.2),  # of two texts one is always kept
        (120, 29_000, 0.083),
        (1_200, 5_000, 0.01),
    ],
)
def test_enough_documents_are_kept_for_validation(
    tmp_path: Path, documents: int, letters: int, fraction: float
) -> None:
    for number in range(documents):
        (tmp_path / f"{number}.txt").touch()
        os.truncate(tmp_path / f"{number}.txt", letters)
    (tmp_path / "empty.txt").touch()
    text = describe_text(str(tmp_path))
    assert text.documents == documents and text.held_fraction(256) == fraction
    tree = compose(Answers(tmp_path, "3m", "nemotron", str(tmp_path), find_machine("cpu")), text)
    assert ("validate_every_steps" in tree["train"]) == (fraction > 0)


def test_records_are_counted_by_the_length_of_the_first(tmp_path: Path, text: Path) -> None:
    assert describe_text(str(text)).documents == pytest.approx(800, rel=0.05)
    column = pyarrow.table({"text": ["a text of some words"] * 300})
    pyarrow.parquet.write_table(column, tmp_path / "a.parquet")
    assert describe_text(str(tmp_path / "a.parquet")).documents == pytest.approx(300)


def test_time_of_a_run_is_that_of_passes_on_one_core(for_a_cpu: Path) -> None:
    """And of a model that is too large to try, by the operations that a smaller one makes."""
    small, large = (ModelConfig.model_validate(model_section(size, "granite")) for size in ("3m", "150m"))
    seconds = cpu_seconds_per_token(small, 64, small)
    ratio = sum(flops_per_token(large, 64).values()) / sum(flops_per_token(small, 64).values())
    assert cpu_seconds_per_token(large, 64, small) / seconds == pytest.approx(ratio, rel=0.9), "two measurements"
    head = for_a_cpu.read_text()
    assert re.search(r"# 400 steps take about [\d.]+ (minutes|hours) on \d+ cores that do nothing else", head)


def test_the_column_with_the_text_is_found_and_a_folder_s_name_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [{"id": "a-much", "content": "a text that is longer than the name of its record"}] * 800
    Path("text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call(Path("my run é"), Path("text.jsonl"), "3m", "nemotron", "cpu") == 0
    config = load_config(Path("my run é/run.yaml"))
    assert config.data.sources[0].text_column == "content"
    assert Path(config.data.store).name == "my_run"
    assert "amfm prepare 'my run é/run.yaml'" in json.loads(capsys.readouterr().out)["next"]
    assert "dir: my run é/runs" in Path("my run é/run.yaml").read_text()
    Path("numbers.jsonl").write_text('{"a": 1, "b": [2]}\n')
    assert call(Path("other"), Path("numbers.jsonl"), "20m", "nemotron", "cpu") == 2
    assert "has no text; its fields are a, b" in capsys.readouterr().err


def test_a_short_run_balances_its_experts_in_big_steps(tmp_path: Path, text: Path) -> None:
    of_experts = compose(Answers(tmp_path, "20m", "nemotron", str(text), find_machine("cpu")), describe_text(str(text)))
    assert of_experts["model"]["moe"]["bias_update_rate"] == 2e-2


def test_the_smallest_model_is_dense_where_its_family_may_be(for_a_cpu: Path) -> None:
    short = load_config(for_a_cpu)
    assert short.model.moe is None and short.model.feed_forward is not None
    assert [style for style in STYLES if "-" in model_section("3m", style)["pattern"]] == ["nemotron"]
    # Fewer steps than planned still leave a schedule that fits: the decay is a share of them.
    load_checked(for_a_cpu, ["train.steps=60"], world_size=1)


@pytest.mark.slow
def test_at_a_terminal_it_asks(tmp_path: Path, text: Path) -> None:
    terminal = Terminal("init", tmp_path / "run")
    for question, answer in {"Size": "150m", "Style": "", "Text": text, "Hardware": "1xh100"}.items():
        terminal.expect(question)
        terminal.type(f"{answer}\n")
    assert terminal.end() == 0
    config = load_checked(tmp_path / "run" / "run.yaml", world_size=1)
    assert config.model == ModelConfig.model_validate(
        model_section("150m", "nemotron") | {"vocab_size": config.model.vocab_size}
    )


@pytest.mark.slow
def test_the_one_for_a_cpu_trains(tmp_path: Path, text: Path) -> None:
    assert call(tmp_path / "run", text, "3m", "nemotron", "cpu") == 0
    path = str(tmp_path / "run" / "run.yaml")
    assert run(["prepare", path]) == 0
    assert run(["train", path, "train.stop_after_steps=2", "train.global_batch_size=4"]) == 0


def test_a_data_set_by_name_is_not_asked_for_and_gives_what_the_run_reads(tmp_path: Path, capsys) -> None:
    flags = {"--size": "20m", "--style": "nemotron", "--data": "hub:owner/big-text/sample", "--hardware": "1xh100"}
    assert run(["init", str(tmp_path / "hub"), *itertools.chain(*flags.items())]) == 0
    config = load_config(tmp_path / "hub/run.yaml")
    (source,) = config.data.sources
    train = config.train
    assert (source.name, source.paths) == ("big-text", ("hub:owner/big-text/sample",))
    assert source.max_tokens >= train.steps * train.global_batch_size * train.sequence_length
    assert config.model.vocab_size == load_config(CONFIGS / "ladder_20m.yaml").model.vocab_size
    flags["--data"] = "hub:owner"
    assert run(["init", str(tmp_path / "wrong"), *itertools.chain(*flags.items())]) == 2
    assert "must be hub:OWNER/NAME" in capsys.readouterr().err
