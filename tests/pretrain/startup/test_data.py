"""Runs on token ids without a tokenizer: they train and are exported; what needs text is rejected at its start."""

import pytest

from amfm.data_pipeline.tokenizer.id_vocabulary import IdVocabulary
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.checks.early import vocabulary_problems
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.inference.generate import TextModel
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.startup.data import check_tokenizer
from tests.data_pipeline.prepare.test_id_vocabulary import of_ids, prepare_here, write_dataset
from tests.pretrain.tiny_run import MODEL, tiny_config, train_and_collect

NEEDS_TEXT = r"text was asked for, and the data was prepared from token ids without a tokenizer"


def test_generation_is_rejected_and_an_export_has_no_tokenizer(tmp_path):
    config = ModelConfig.model_validate(MODEL)
    state = HybridModel(config, single_rank_groups(), backend="torch").state_dict()
    weights = Weights(config, state, IdVocabulary(448, 7), "a model of ids")
    with pytest.raises(ValueError, match=f"a model of ids: {NEEDS_TEXT}"):
        TextModel(weights, device="cpu", backend="torch")
    files = export_checkpoint(weights, tmp_path / "out", verify=False).files
    assert [name for name in files if "token" in name] == ["tokenizer.ids"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the folder has no tokenizer" in card and "AutoTokenizer" not in card


def test_settings_that_need_text_are_rejected_at_the_start(tmp_path):
    data = of_ids(tmp_path, write_dataset(tmp_path))
    prepare_here(data)
    for name, value in (("prompts", ["Once"]), ("tasks", ["arc_easy"])):
        with pytest.raises(ValueError, match=f"evaluate.{name}: {NEEDS_TEXT}"):
            check_tokenizer(tiny_config(data, tmp_path / "run", **{f"evaluate__{name}": value}))


def test_the_size_of_a_trained_tokenizer_does_not_matter_to_sources_of_ids(tmp_path):
    prefix = write_dataset(tmp_path)
    for data in (of_ids(tmp_path, prefix), of_ids(tmp_path, "ids.jsonl", eos_token=7)):
        assert not list(vocabulary_problems(tiny_config(data, tmp_path / "run")))
    (problem,) = vocabulary_problems(tiny_config(of_ids(tmp_path, "a.jsonl"), tmp_path / "run"))
    assert "must be at least data.tokenizer.vocab_size=4096" in problem.rule


@pytest.mark.slow
def test_a_run_of_ids_trains_and_its_export_has_the_same_logits_and_comes_back(tmp_path):
    data = of_ids(tmp_path, write_dataset(tmp_path, number=300))
    prepare_here(data, 448 + 64)
    config = tiny_config(data, tmp_path / "run", model__vocab_size=512)
    assert train_and_collect(config).code == 0
    report = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert report.same_argmax and "no tokenizer is in the export" in report.compared
    import_huggingface(tmp_path / "out", tmp_path / "back")
    assert read_weights(tmp_path / "back").vocabulary == IdVocabulary(512, 7)
