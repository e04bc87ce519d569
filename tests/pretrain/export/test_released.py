"""A released model that is continued keeps what makes it usable: chat template, special tokens, sampling and positions."""

from __future__ import annotations

import json
from pathlib import Path

from amfm_serve.completions import load_model

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.export.export import ExportReport, export_checkpoint
from amfm.pretrain.export.import_huggingface import ImportReport, import_huggingface
from amfm.pretrain.train import train
from tests.pretrain.export.exported_models import weights_folder
from tests.pretrain.tiny_run import tiny_config

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def import_released(data: DataConfig, folder: Path) -> ImportReport:
    """Import a model as someone released it: with a template, two end tokens, a pad token and 262,144 positions."""
    released = folder / "released"
    export_checkpoint(weights_folder(data, folder / "weights", "nemotron_h"), released, verify=False)
    edit(released / "config.json", eos_token_id=[2, 0], pad_token_id=1, max_position_embeddings=262_144)
    edit(released / "generation_config.json", eos_token_id=[2, 0], pad_token_id=1, temperature=0.6, top_p=0.95)
    edit(released / "tokenizer_config.json", pad_token="<s>", add_bos_token=True)
    (released / "chat_template.jinja").write_text(TEMPLATE)
    (released / "preprocessor_config.json").write_text("{}")
    return import_huggingface(released, folder / "import")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_usable(report: ExportReport) -> None:
    """Use an export as its users do."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(report.path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    assert tokenizer(["a", "a longer one"], padding=True)["input_ids"][0][-1] == 1
    assert tokenizer.model_max_length == 262_144
    sampling = GenerationConfig.from_pretrained(report.path)
    assert (sampling.eos_token_id, sampling.temperature, sampling.top_p) == ([2, 0], 0.6, 0.95)
    config = AutoConfig.from_pretrained(report.path)
    assert (config.max_position_embeddings, config.pad_token_id, config.eos_token_id) == (262_144, 1, [2, 0])
    assert "a chat template" in report.kept and "262,144 positions" in report.kept


def test_what_a_released_model_brings_along_comes_through_import_training_and_export(
    data: DataConfig, tmp_path: Path
) -> None:
    report = import_released(data, tmp_path)
    assert {"a chat template", "end tokens [2, 0]", "the pad token <s>", "262,144 positions"} <= set(report.kept)
    assert report.dropped[0] == "preprocessor_config.json" and report.dropped[1].startswith("add_bos_token")
    check_usable(export_checkpoint(tmp_path / "import", tmp_path / "again", verify=False))
    run = tiny_config(data, tmp_path / "run", run__initial_weights=str(tmp_path / "import"), train__steps=1)
    assert train(run.model_copy(update={"schedule": run.schedule.model_copy(update={"warmup_steps": 0})})) == 0
    served = load_model(tmp_path / "run", device="cpu", backend="torch", max_state_bytes=0)
    assert served.render_chat([{"role": "user", "content": "hi"}]) == "<user>hi" and served.end_ids == {0, 2}
    assert served.encode_chat("</s>") == [2]
    (tmp_path / "import" / "released.json").unlink()  # the run has its own copy
    check_usable(export_checkpoint(tmp_path / "run", tmp_path / "continued", verify=False))
