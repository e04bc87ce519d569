"""The command line: exit codes, one message for bad input, examples in every help, one JSON object for scripts."""

import base64
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.loader.loader import PretrainLoader
from data_pipeline.prepare.prepare import Progress
from data_pipeline.store.megatron_files import read_megatron_index
from data_pipeline.store.store import TokenStore
from data_pipeline.tokenizer.tokenizer import load_tokenizer, read_tokenizer_file
from launch.cli import app, describe, exit_code, run
from launch.commands.data import describe_progress
from pretrain.config.file import load_config
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.config.test_config import BASE
from tests.pretrain.report.test_report import line, make_run

VERBS = [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def one_object(text: str) -> dict[str, object]:
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def test_the_verbs_are_those_of_the_contract():
    assert set(VERBS) == {
        *("doctor", "config", "corpus", "prepare", "train", "inspect", "report", "plan", "launch"),
        *("evaluate", "generate", "export", "import", "init"),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run([verb, "--help"]) == 0
    assert f"Example: amfm {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["config", "train"])
def test_help_fits_a_screen_and_whole_help_lists_every_setting_of_the_schema(verb, capsys):
    assert run([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--help-all" in text and "model.moe.top_k" not in text and text.count("\n") <= 50
    assert run([verb, "--help-all"]) == 0
    text = capsys.readouterr().out
    assert f"Example: amfm {verb}" in text
    for key in ("train.steps", "model.moe.top_k", "data.sources.*.weight"):
        assert key in text


def test_the_version_is_that_of_the_package(capsys):
    assert run(["--version"]) == 0
    assert re.fullmatch(r"amfm (\d+\.\d+\.\d+\S*|\(not installed\))\n", capsys.readouterr().out)


def test_a_shell_completes_verbs_and_flags(monkeypatch, capsys):
    monkeypatch.setenv("_AMFM_COMPLETE", "complete_bash")
    for words, number, expected in (("amfm tr", "1", "train"), ("amfm plan --gp", "2", "--gpus")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", number)
        assert run([]) == 0
        assert expected in capsys.readouterr().out.split()


def test_errors_are_json_under_json(base, capsys):
    base.write_text(BASE.replace("steps: 1e2", "steps: 0"))
    assert run(["config", str(base), "--json"]) == 2
    captured = capsys.readouterr()
    error = one_object(captured.out)
    assert error["exit_code"] == 2 and str(error["error"]) in captured.err
    assert error["problems"] == [
        {
            "key": "train.steps",
            "value": "0",
            "file": str(base),
            "line": BASE[: BASE.index("steps")].count("\n") + 1,
            "rule": "must be greater than 0",
            "remedy": "raise it",
        }
    ]
    assert run(["plan", str(base), "--json"]) == 2
    assert one_object(capsys.readouterr().out) == {"error": "Missing option '--gpus'.", "exit_code": 2}
    assert run(["report", str(base.parent / "none"), "--json"]) == 2
    assert "is no run directory" in str(one_object(capsys.readouterr().out)["error"])


def test_help_answers_in_a_second_without_heavy_packages():
    code = "import sys, launch.cli; sys.exit(bool({'torch', 'ray', 'zarr', 'transformers', 'deepspeed'} & set(sys.modules)))"
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    # Alone on a machine it takes 0.3 s; the rest is for a busy one.
    assert time.monotonic() - began < 5


def test_module_and_command_are_one(base):
    done = subprocess.run(
        [sys.executable, "-m", "launch", "config", str(base), "train.stepz=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "amfm: override train.stepz=1: unknown key; did you mean train.steps?\n"
    assert done.stdout == ""


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


def test_an_absent_file_is_bad_input(capsys):
    assert run(["config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "amfm: nowhere.yaml does not exist; name an existing YAML file\n"


def test_an_unknown_option_is_bad_input():
    assert run(["config", "--stepz", "3"]) == 2


def test_errors_map_to_exit_codes():
    assert exit_code(ValueError("a setting")) == 2
    assert exit_code(FileNotFoundError(2, "absent")) == 2
    assert exit_code(PermissionError(13, "read-only")) == 2
    assert exit_code(RuntimeError("a rank died")) == 3
    assert exit_code(OSError(28, "No space left on device")) == 3


def test_errors_of_the_system_name_path_and_remedy():
    denied = PermissionError(13, "Permission denied", "runs/x")
    assert describe(denied) == "runs/x: Permission denied; name another path, or make this one readable and writable"
    full = OSError(28, "No space left on device", "runs/x")
    assert describe(full) == "runs/x: No space left on device; make room and go on"
    assert describe(RuntimeError()) == "RuntimeError"


def test_a_run_that_failed_says_how_to_go_on(monkeypatch, base, capsys):
    def failing(*arguments: object, **options: object) -> None:
        raise RuntimeError("rank 1 died")

    monkeypatch.setattr("pretrain.checks.check_run.load_checked", failing)
    assert run(["train", str(base)]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "amfm: rank 1 died",
        "amfm: train stopped; resume with the same command (amfm --traceback train ... shows where it failed)",
    ]


@pytest.mark.parametrize("kind", [KeyError, RecursionError, NotImplementedError])
def test_a_bug_keeps_its_traceback(kind, monkeypatch, base):
    def broken(*arguments: object, **options: object) -> None:
        raise kind("bug")

    monkeypatch.setattr("pretrain.checks.check_run.load_checked", broken)
    with pytest.raises(kind, match="bug"):
        run(["config", str(base)])


def test_the_traceback_of_an_error_can_be_asked_for():
    with pytest.raises(FileNotFoundError):
        run(["--traceback", "config", "nowhere.yaml"])


def test_corpus_names_the_known_ones(capsys):
    assert run(["corpus", "encyclopedia"]) == 2
    assert "corpus 'encyclopedia' must be one of shakespeare" in capsys.readouterr().err


def test_prepare_checks_the_whole_configuration_first(base, capsys):
    assert run(["prepare", str(base), "train.stop_after_steps=200"]) == 2
    assert "train.stop_after_steps=200: is beyond train.steps=100" in capsys.readouterr().err


def test_prepare_names_missing_text(base, capsys, tmp_path):
    assert (
        run(["prepare", str(base), f"data.store={tmp_path}/store", f"data.sources.0.paths=[{tmp_path}/none.txt]"]) == 2
    )
    assert "none.txt" in capsys.readouterr().err


def test_report_writes_a_page(tmp_path, capsys):
    run_dir = make_run(tmp_path, [line(1), line(2)])
    assert run(["report", str(run_dir), "--json"]) == 0
    page = Path(str(one_object(capsys.readouterr().out)["report"]))
    assert page.read_text().startswith("<!doctype html>")
    picture = tmp_path / "curves.png"
    assert run(["report", str(run_dir), "--picture", str(picture), "--json"]) == 0
    assert one_object(capsys.readouterr().out)["picture"] == str(picture) and picture.stat().st_size > 10_000
    assert run(["report", str(run_dir), "--picture", str(tmp_path / "curves.gif")]) == 2
    assert "must end in one of .png, .svg, .pdf; use curves.png" in capsys.readouterr().err
    assert run(["report", str(tmp_path / "none")]) == 2


def test_inspect_verifies_a_store_and_finds_a_flipped_byte(tmp_path, capsys):
    store = Path(make_tiny_store(tmp_path).store)
    assert run(["inspect", str(store), "--json"]) == 0
    found = one_object(capsys.readouterr().out)
    assert (found["kind"], found["ok"], found["problems"]) == ("token store", True, [])
    shard = min(store.rglob("tokens/c/0"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run(["inspect", str(store), "--json"]) == 2
    captured = capsys.readouterr()
    found = one_object(captured.out)
    assert found["ok"] is False
    assert "fails its crc32c" in found["problems"][0]
    assert run(["inspect", str(store), "--quick", "--json"]) == 0, "sizes and indices are as they were"
    assert one_object(capsys.readouterr().out)["verified"] == "sizes, indices and document ends"


def test_progress_of_a_preparation_names_rates_and_the_time_to_go():
    now = Progress("tokenize", 3, 8, 1500, 6_000_000, 2_000_000, rejects=4, seconds=2.0, eta_seconds=3.4)
    remark = "2,000,000 tokens, 750 documents/s, 3.0 MB/s, 1,000,000 tokens/s, 3 s to go"
    assert describe_progress(now) == (3, 8, remark)
    assert describe_progress(replace(now, stage="duplicates"))[2] == "looking for duplicates, 3.0 MB/s"
    assert describe_progress(replace(now, stage="tokenizer"))[2] == "training the tokenizer"


def test_tokens_of_a_store_are_exported_for_megatron(tmp_path, capsys):
    store = TokenStore.open(make_tiny_store(tmp_path, num_sources=2).store)
    assert run(["export", str(store.path), str(tmp_path / "out"), "--format", "megatron", "--json"]) == 0
    documents = one_object(capsys.readouterr().out)["documents"]
    assert sum(documents.values()) == sum(part.num_documents for _, _, part in store.all_parts())
    for name in documents:
        assert read_megatron_index(tmp_path / "out" / f"{name}.idx").num_documents == documents[name]
    assert run(["export", str(tmp_path), str(tmp_path / "out"), "--format", "megatron"]) == 2
    assert "must hold a prepared store" in capsys.readouterr().err


def test_a_tiktoken_file_becomes_a_tokenizer_json(tmp_path, capsys):
    file, out = tmp_path / "bytes.tiktoken", tmp_path / "out"
    file.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    options = ["--pattern", r"\p{L}+|[^\p{L}]", "--special", "<end>=300"]
    assert run(["import", str(file), str(out), *options]) == 0
    tokenizer = read_tokenizer_file(out / "tokenizer.json", "<end>")
    assert tokenizer.encode("aé ") == [0x61, 0xC3, 0xA9, 0x20] and tokenizer.eos_id == 300
    assert run(["import", str(file), str(out)]) == 2
    assert "give it with --pattern" in capsys.readouterr().err
    assert run(["import", str(file), str(out), "--pattern", ".", "--special", "end"]) == 2
    assert "must be TOKEN=ID" in capsys.readouterr().err
    assert run(["import", str(tmp_path), str(out), "--pattern", "."]) == 2
    assert "are for a .tiktoken file" in capsys.readouterr().err


def test_inspect_decodes_what_a_global_sample_trains_on(tmp_path, base, capsys):
    data = make_tiny_store(tmp_path / "data")
    settings = load_config(base).model_dump(mode="json") | {"data": data.model_dump(mode="json")}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings))
    loader = PretrainLoader(
        data, sequence_length=settings["train"]["sequence_length"], micro_batch_size=1, seed=settings["train"]["seed"]
    )
    loader.seek(9)
    expected = loader.take(1)[0].tokens_BT[0].tolist()
    for arguments in ([str(tmp_path)], [data.store, "--config", str(config)]):
        assert run(["inspect", *arguments, "--sample", "9", "--json"]) == 0
        assert one_object(capsys.readouterr().out)["tokens"] == expected
    assert run(["inspect", str(tmp_path), "--sample", "9"]) == 0
    shown = capsys.readouterr().out
    text = load_tokenizer(data.store).decode(expected[:20])
    assert "source0, epoch 0" in shown and "--- document" in shown and text.split()[1] in shown
    assert run(["inspect", data.store, "--sample", "9"]) == 2
    assert "needs a run directory, or a store and --config CONFIG" in capsys.readouterr().err
    assert run(["inspect", data.store, "--config", str(config)]) == 2
    assert "is for --sample G" in capsys.readouterr().err


def test_inspect_verifies_an_export_against_its_index(tmp_path, capsys):
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text(json.dumps({"architectures": ["NemotronHForCausalLM"], "model_type": "x"}))
    save_file({"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.zeros(2, 2)}, export / "model-1.safetensors")
    assert run(["inspect", str(export), "--json"]) == 0
    found = one_object(capsys.readouterr().out)
    assert (found["kind"], found["class"], found["parameters"]) == ("export", "NemotronHForCausalLM", 7)
    index = {"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}}
    (export / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run(["inspect", str(export), "--json"]) == 2
    problems = one_object(capsys.readouterr().out)["problems"]
    assert any(text.endswith("tensor b is not in the index") for text in problems)
    assert any(text.endswith("tensor c is in no file") for text in problems)
    content = (export / "model-1.safetensors").read_bytes()
    (export / "model-1.safetensors").write_bytes(content[:-4])
    assert run(["inspect", str(export)]) == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err


def test_inspect_names_what_it_can_read(tmp_path, capsys):
    assert run(["inspect", str(tmp_path)]) == 2
    assert "is no token store, checkpoint, run, import or export" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "none")]) == 2
    assert "does not exist; name the folder of a store" in capsys.readouterr().err


def test_inspect_compares_two_runs(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = make_run(tmp_path / "a", [line(1)])
    second = make_run(tmp_path / "b", [line(1), line(2)], "train.steps=7")
    assert run(["inspect", str(second), "--diff", str(first), "--json"]) == 0
    found = one_object(capsys.readouterr().out)
    assert found["train.steps"] == {"other": 100, "this": 7}
    assert found["last_step"] == {"other": 1, "this": 2}


@pytest.mark.parametrize(
    "arguments",
    [["evaluate", "RUN"], ["generate", "RUN", "--prompt", "x"], ["export", "RUN", "OUT"]],
    ids=["evaluate", "generate", "export"],
)
def test_verbs_that_use_a_model_say_what_they_accept(arguments, tmp_path, capsys):
    places = {"RUN": str(tmp_path / "empty"), "OUT": str(tmp_path / "out")}
    (tmp_path / "empty").mkdir()
    assert run([places.get(word, word) for word in arguments]) == 2
    assert "is no checkpoint, run directory or imported model; give RUN_DIR" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_import_says_what_is_missing(tmp_path, capsys):
    assert run(["import", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.json is missing; give a folder that transformers wrote" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is absent")
def test_an_absent_device_is_bad_input(tmp_path, capsys):
    assert run(["generate", str(tmp_path), "--prompt", "x", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("amfm: --device cuda needs a CUDA device, and torch sees none")
