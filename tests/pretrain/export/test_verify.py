"""The verification of an export: what fails it, and what is said then."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from amfm.data_pipeline.config import DataConfig
from amfm.model.packing import PackMeta
from amfm.pretrain.export.export import ODD_TEXTS, export_checkpoint, find_error, find_problems, proof_text, run_proof
from amfm.pretrain.export.files import ExportPlan, write_export
from amfm.pretrain.export.verify import compare_logits, compare_tokens
from amfm.pretrain.inference.weights import write_weights
from tests.pretrain.export.exported_models import MODELS, random_weights


@pytest.mark.slow  # the quick one is below: NaN in a norm fails the verification, and missing keys are said
def test_a_missing_head_fails_the_proof(data: DataConfig, tmp_path: Path) -> None:
    # transformers only warns about a missing head and fills it with random numbers.
    plan = ExportPlan(random_weights(data, MODELS["nemotron_h"]), "nemotron_h", 48)
    write_export(plan, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens_BT, texts, _ = proof_text(plan.weights)
    problems = "; ".join(find_problems(plan, run_proof(plan, tmp_path, tokens_BT, texts)))
    assert "lm_head.weight" in problems
    assert "logits differ" in problems


def test_a_failed_proof_is_a_failed_export_and_leaves_no_folder(data: DataConfig, tmp_path: Path) -> None:
    """Of our own class: NaN among its logits shows that the program has loaded it."""
    weights = random_weights(data, MODELS["own"])
    state = dict(weights.state)
    state["final_norm.weight"] = torch.full_like(state["final_norm.weight"], torch.nan)
    (tmp_path / "weights").mkdir()
    write_weights(tmp_path / "weights", replace(weights, state=state))
    with pytest.raises(
        RuntimeError, match=r"failed verification: logits differ by up to nan.*out\.failed for examination"
    ):
        export_checkpoint(tmp_path / "weights", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.amfm-export").exists()
    assert (tmp_path / "out.failed" / "config.json").is_file()


def test_another_most_likely_token_is_found_where_one_leads_and_not_in_a_near_tie(
    data: DataConfig, tmp_path: Path
) -> None:
    plan = ExportPlan(random_weights(data, MODELS["nemotron_h"]), "nemotron_h", 48)
    write_export(plan, tmp_path)
    tokens_BT = torch.arange(20, 28)[None]
    job = {"export": str(tmp_path), "remote_code": False, "tolerance": 1e-4}
    with torch.no_grad():
        meta = PackMeta.one_document_a_row(*tokens_BT.shape)
        logits_BTV = plan.weights.build()(tokens_BT, meta).logits_BTV.clone()
    first, second = logits_BTV[0, 5].topk(2).indices.tolist()
    for lead, expected in ((0.0, True), (1e-5, True), (1.0, False)):
        changed_BTV = logits_BTV.clone()
        changed_BTV[0, 5, second] = changed_BTV[0, 5, first] + lead
        save_file({"tokens_BT": tokens_BT, "logits_BTV": changed_BTV}, tmp_path / "reference.safetensors")
        assert compare_logits(job, tmp_path)["same_argmax"] is expected, lead


def test_texts_are_read_as_training_read_them_and_what_differs_is_counted(tmp_path: Path) -> None:
    """A tokenizer of letters, without capitals, that begins each text with a token of its own and has a control token."""
    letters = {token: number for number, token in enumerate(["<s>", "<end>", "?", *"abc<>snd/"])}
    backend = Tokenizer(WordLevel(letters, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = Split("", "isolated"), Fuse()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    saved = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<end>", unk_token="?", clean_up_tokenization_spaces=False
    )
    saved.save_pretrained(tmp_path)
    job = {"export": str(tmp_path), "remote_code": False}
    texts: list[tuple[str, list[int], bool]] = [
        ("abc", [0, 3, 4, 5], True),
        ("<end>", [0, 6, 2, 9, 10, 7], False),
        ("bA", [0, 4, 2], False),
        ("cb", [0, 5, 5, 5], True),
    ]
    assert compare_tokens(job | {"texts": texts[:3]}) == {
        "differing_texts": [], "wrong_ids": 0, "num_ids": 13, "undecoded_texts": []
    }  # fmt: skip
    assert compare_tokens(job | {"texts": texts[3:]}) == {
        "differing_texts": ["cb"], "wrong_ids": 2, "num_ids": 4, "undecoded_texts": ["cb"]
    }  # fmt: skip


def test_what_speaks_against_an_export_is_said(data: DataConfig) -> None:
    plan = ExportPlan(random_weights(data, MODELS["nemotron_h"]), "nemotron_h", 48)
    good = {
        "class_name": "NemotronHForCausalLM",
        "keys": {},
        "max_logit_difference": 1e-6,
        "same_argmax": True,
        "wrong_ids": 0,
        "num_ids": 100,
        "differing_texts": [],
        "undecoded_texts": [],
    }
    assert find_problems(plan, good) == []
    for change, expected in [
        ({"max_logit_difference": 2e-4}, "logits differ by up to 2.00e-04"),
        ({"max_logit_difference": math.nan}, "logits differ"),
        ({"same_argmax": False}, "most likely token differs"),
        ({"keys": {"unexpected_keys": ["x"]}}, "did not match the class"),
        ({"class_name": "LlamaForCausalLM"}, "loads as LlamaForCausalLM"),
        ({"wrong_ids": 1, "differing_texts": ["abc"]}, "other ids for"),
        ({"undecoded_texts": ["abc"]}, "does not restore"),
    ]:
        (problem,) = find_problems(plan, good | change)
        assert expected in problem


def test_the_last_error_of_a_program_that_ended_is_the_problem(data: DataConfig) -> None:
    output = (
        "a warning\nTraceback (most recent call last):\n  File x, line 1\nValueError: nothing like it\nin two lines\n"
    )
    assert (
        find_error(f"Traceback (most recent call last):\nKeyError: 1\n\n{output}")
        == "ValueError: nothing like it in two lines"
    )
    plan = ExportPlan(random_weights(data, MODELS["nemotron_h"]), "nemotron_h", 48)
    (problem,) = find_problems(plan, {"crash": find_error(output)})
    assert "nothing like it" in problem


@pytest.mark.slow  # quick: the test above, of what such a program has printed
def test_a_folder_that_cannot_be_loaded_is_reported_with_the_reason(data: DataConfig, tmp_path: Path) -> None:
    plan = ExportPlan(random_weights(data, MODELS["nemotron_h"]), "nemotron_h", 48)
    (tmp_path / "config.json").write_text('{"model_type": "nothing_like_it"}')
    tokens_BT, texts, _ = proof_text(plan.weights)
    (problem,) = find_problems(plan, run_proof(plan, tmp_path, tokens_BT, texts))
    assert "nothing_like_it" in problem


def test_a_model_without_validation_text_is_compared_on_a_sample(data: DataConfig) -> None:
    weights = random_weights(data, MODELS["nemotron_h"])
    tokens_BT, texts, source = proof_text(weights)
    assert source == "a built-in sample"
    assert tokens_BT.shape[0] == 2 and tokens_BT.shape[1] > 64, "longer than a chunk, so that states are carried"
    assert set(ODD_TEXTS) <= set(texts)
