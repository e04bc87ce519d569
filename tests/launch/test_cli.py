"""The command line: exit codes, one message for bad input, examples in every help, one JSON object for scripts."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from amfm.launch.cli import describe, exit_code, run
from amfm.launch.verbs import PACKAGED, VERBS, load_verb
from tests.helpers.json_output import one_object
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.processes.zygote import run_program
from tests.pretrain.config.files import BASE

ROOT = Path(__file__).parents[2]


def test_the_verbs_are_those_of_the_contract():
    assert set(VERBS) == {
        *("bench", "study"),
        *("doctor", "config", "sample-data", "prepare", "train", "rollback", "inspect", "report", "plan", "launch"),
        *(
            "evaluate",
            "generate",
            "export",
            "import",
            "init",
            "profile",
            "runs",
            "watch",
            "serve",
            "tasks",
            "merge",
            "fork",
            "replay",
            "compact",
            "convert",
            "distill",
            "recipes",
        ),
    }


def test_help_of_a_verb_begins_with_its_line_in_the_list():
    for name in ("train", "watch", "import", "bench"):
        verb = load_verb(name)
        assert verb.name == name and verb.help.split("\n\n")[0] == VERBS[name][2] and not verb.short_help
    assert load_verb("watch").help.split("\n\n")[1].startswith("Only reads.")


def without_packages() -> list[str]:
    """Where Python imports from, without the places at which pip, or the tests, have installed packages of examples."""
    names = [path.parent.name for path in (ROOT / "examples").glob("*/pyproject.toml")]
    return [place for place in sys.path if not any(list(Path(place).glob(f"amfm_{name}*-info")) for name in names)]


def test_a_verb_of_a_package_that_is_not_installed_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", without_packages())
    for words in (
        ["study", "mixers", "study.yaml"],
        ["convert", "convert.yaml"],
        ["tasks", "data/x", "out"],
        ["compact", "runs/my", "small"],
        ["replay", "runs/my", "--step", "9"],
        ["serve", "runs/x"],
        ["profile", "runs/x"],
    ):
        assert run(words) == 2
        remedy = f"in a clone of amfm: pip install ./examples/{words[0]}\n"
        assert capsys.readouterr().err == f"amfm: amfm {words[0]} is in a package that is not installed; {remedy}"


def test_a_part_of_a_verb_whose_package_is_not_installed_says_how_to_install_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", without_packages())
    (tmp_path / ".metadata").touch()
    script = tmp_path / "train.sh"
    script.touch()
    states, clients = "foreign_states", "clients"
    for part, package, words in (
        ("import (training-state)", states, ["import", tmp_path, tmp_path / "out"]),
        ("import (megatron-args)", states, ["import", "megatron-args", script, tmp_path / "run.yaml"]),
        ("import (blend)", states, ["import", "blend", script, tmp_path / "sources.yaml"]),
        ("export (training-state)", states, ["export", tmp_path, tmp_path / "out", "--format", "dcp"]),
        ("export (check)", clients, ["export", tmp_path, "--check", "vllm"]),
        ("export (gguf)", clients, ["export", tmp_path, tmp_path / "out.gguf", "--format", "gguf"]),
        ("watch (metrics)", "serve ./examples/prometheus", ["watch", tmp_path, "--prometheus", "9464"]),
        ("plan (trace)", "simulate", ["plan", "--preset", "tiny_cpu", "--gpus", "1", "--trace"]),
        ("evaluate (synthetic)", "synthetic", ["evaluate", tmp_path, "--synthetic", "mqar"]),
        ("inspect (spike)", "replay", ["inspect", tmp_path, "--spike", "9"]),
    ):
        assert run([str(word) for word in words]) == 2
        remedy = "is in a package that is not installed; in a clone of amfm: pip install ./examples"
        assert capsys.readouterr().err == f"amfm: amfm {part} {remedy}/{package}\n"


@pytest.mark.parametrize("verb", [name for name, (_, file, _) in VERBS.items() if file != PACKAGED])
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Example: amfm {verb}" in shown
    assert "<bool>" not in shown, "a flag takes no value"


@pytest.mark.parametrize("verb", ["train", pytest.param("config", marks=pytest.mark.slow)])
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
    assert "none does not exist" in str(one_object(capsys.readouterr().out)["error"])


def test_help_answers_in_a_second_without_heavy_packages():
    code = "import sys, amfm.launch.cli; sys.exit(bool({'torch', 'ray', 'zarr', 'transformers', 'deepspeed'} & set(sys.modules)))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of the processor, so that a busy machine changes nothing: 0.3 here.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    ("words", "code", "is_full"), [(["train.stepz=1"], 2, True), pytest.param([], 0, False, marks=pytest.mark.slow)]
)
def test_standard_error_that_takes_nothing_changes_no_exit_code(base, words, code, is_full):
    """A log on a full disk, and `2>&1 | head -1`, whose reader has ended."""
    reader, errors = os.pipe()
    os.close(reader)
    if is_full:
        os.close(errors)
        errors = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-m", "amfm.launch", "config", str(base), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=False)
    assert done.returncode == code and bool(done.stdout) == (code == 0)
    os.close(errors)


def test_an_override_in_another_encoding_is_explained(base):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "amfm.launch", "config", str(base), "run.dir=d\u00e9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "its bytes are not text in this locale's encoding, ANSI_X3.4-1968; set LC_ALL=C.UTF-8" in done.stderr


def test_module_and_command_are_one(base):
    done = run_program([sys.executable, "-m", "amfm.launch", "config", str(base), "train.stepz=1"])
    assert done.returncode == 2
    assert done.stderr == "amfm: override train.stepz=1: unknown key; did you mean train.steps?\n"
    assert done.stdout == ""


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
    assert describe(full) == "runs/x: No space left on device; free space and continue"
    assert describe(RuntimeError()) == "RuntimeError"


def test_a_run_that_failed_says_how_to_go_on(monkeypatch, base, capsys):
    def failing(*arguments: object, **options: object) -> None:
        raise RuntimeError("rank 1 died")

    monkeypatch.setattr("amfm.pretrain.checks.load.load_checked", failing)
    assert run(["prepare", str(base)]) == 3
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "amfm: rank 1 died",
        "amfm: prepare stopped; resume with the same command (amfm --traceback prepare ... shows where it failed)",
    ]
    assert run(["launch", str(base), "--on", "slurm", "--nodes", "1", "--dry-run"]) == 3
    assert "amfm: launch stopped; the same command may be run again" in capsys.readouterr().err, "nothing was begun"


def test_memory_that_is_used_up_is_the_machines_state(monkeypatch, base, capsys):
    def broken(*arguments: object, **options: object) -> None:
        raise MemoryError("malloc of size 369367187904 failed")

    monkeypatch.setattr("amfm.pretrain.checks.load.load_checked", broken)
    assert run(["config", str(base)]) == 3
    assert "this host's memory is used up (malloc of size 369367187904 failed)" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_interrupted_preparation_says_how_to_go_on(flags, monkeypatch, base, capsys):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("amfm.data_pipeline.prepare.prepare.prepare", interrupted)
    assert run(["prepare", str(base), *flags]) == 130
    assert "amfm: prepare interrupted; the same command does what is missing" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [KeyError, RecursionError, NotImplementedError])
def test_a_bug_keeps_its_traceback(kind, monkeypatch, base):
    def broken(*arguments: object, **options: object) -> None:
        raise kind("bug")

    monkeypatch.setattr("amfm.pretrain.checks.load.load_checked", broken)
    with pytest.raises(kind, match="bug"):
        run(["config", str(base)])


def test_the_traceback_of_an_error_can_be_asked_for():
    with pytest.raises(FileNotFoundError):
        run(["--traceback", "config", "nowhere.yaml"])


INTERRUPTED_AT_TYPER = """
import runpy, signal, sys

class Interrupt:
    def find_spec(name, path, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would start with it ignored
sys.meta_path.insert(0, Interrupt)
runpy.run_module("amfm.launch", run_name="__main__")
"""


def test_ctrl_c_while_the_command_line_is_imported_ends_in_silence():
    command = [sys.executable, "-c", INTERRUPTED_AT_TYPER]
    end = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert (end.returncode, end.stderr) == (130, "")


def test_no_import_of_ours_is_hidden_in_a_string() -> None:
    """Contracts of imports (pyproject.toml) do not see those, and circles come back through them."""
    files = [
        path for folder in ("launch", "pretrain", "model", "data_pipeline") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 400
    assert [
        str(path) for path in files if re.search(r'import_module\(\s*f?"amfm', path.read_text(encoding="utf-8"))
    ] == []
