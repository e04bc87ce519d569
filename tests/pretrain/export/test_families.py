"""A released model of a plain family is imported, trained, and leaves as its family: transformers generates from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.export.export import LOGIT_TOLERANCE, export_checkpoint
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.train import train
from tests.helpers.numbers import assert_bitwise
from tests.model.huggingface.families import CASES, made_by_transformers
from tests.pretrain.tiny_run import tiny_config

STEPS = 20
# AutoTokenizer reads folders of the class as byte-level BPE whatever is there, and the store's tokenizer is none.
WRITTEN_AS = {"qwen3_5_text": "qwen3_next", "qwen2": "own"}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), CASES.values(), ids=CASES.keys())
def test_a_family_is_trained_and_generates(
    data: DataConfig, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made_by_transformers(kind, {"eos_token_id": 2, **changes, "vocab_size": 448}, tmp_path / "released")
    tokenizer = Path(data.text_store()) / "tokenizer.model"
    (tmp_path / "released" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    imported = import_huggingface(tmp_path / "released", tmp_path / "import")
    run = tiny_config(data, tmp_path / "run", run__initial_weights=str(tmp_path / "import"), train__steps=STEPS)
    assert train(run.model_copy(update={"model": imported.model})) == 0
    trained = read_weights(tmp_path / "run")
    first = read_weights(tmp_path / "import")
    assert trained.step == STEPS and not torch.equal(trained.state["embedding.weight"], first.state["embedding.weight"])

    report = export_checkpoint(tmp_path / "run", tmp_path / "out")
    kind = WRITTEN_AS.get(kind, kind)
    assert report.target == kind and report.same_argmax
    assert report.max_logit_difference is not None and report.max_logit_difference <= LOGIT_TOLERANCE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)(
        "some of ours", return_tensors="pt"
    )
    made = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert made.shape[1] == prompt["input_ids"].shape[1] + 8

    back = import_huggingface(tmp_path / "out", tmp_path / "back")
    assert back.target == kind and back.model == trained.model
    returned = read_weights(tmp_path / "back").state
    for name, weight in trained.state.items():
        assert_bitwise(returned[name], weight, name)
