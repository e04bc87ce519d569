"""`amfm inspect`: what a path holds, verified, and what differs from another."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from amfm.launch.cli import run
from amfm.launch.commands.data import show_facts
from tests.helpers.json_output import one_object
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.report.test_report import line, make_run


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
    assert "is not a token store, teacher store, checkpoint, run, import or export" in capsys.readouterr().err
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


def test_inspect_of_a_run_shows_its_losses_and_what_went_wrong(tmp_path, capsys):
    folder = make_run(tmp_path, [line(1, validation_loss=5.0), line(2, loss=4.5)])
    events = [{"event": "start"}, {"event": "experts_collapsed"}, {"event": "experts_collapsed"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event | {"step": 1}) + "\n" for event in events))
    assert run(["inspect", str(folder), "--json"]) == 0
    found = one_object(capsys.readouterr().out)
    assert (found["loss"], found["validation_loss"], found["warnings"]) == (4.5, 5.0, ["experts_collapsed"])


def test_a_manifest_beyond_any_size_is_refused_and_not_read(tmp_path, capsys):
    (tmp_path / "manifest.json").touch()
    os.truncate(tmp_path / "manifest.json", 1 << 40)
    assert run(["inspect", str(tmp_path)]) == 2
    assert "more than the" in capsys.readouterr().err


def test_facts_of_facts_have_rows_of_their_own_and_losses_four_digits():
    facts = {"state": {"progress": {"step": 1234, "loss": 2.123456789, "rank": None, "ok": True}}, "sizes": {"a": 1000}}
    assert list(show_facts(facts)) == [
        ("state", ""),
        ("  progress", ""),
        ("    step", "1,234"),
        ("    loss", "2.123"),
        ("    rank", "-"),
        ("    ok", "True"),
        ("sizes", "a: 1,000"),
    ]
