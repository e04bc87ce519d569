"""Llama and Qwen3 are read as transformers computes them, as teachers; what our model has not is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.packing import PackMeta
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.inference.weights import read_weights

SIZES: dict[str, Any] = {
    "vocab_size": 448,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
}
# As Llama 3.1 has it, over a shorter text.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def save_model(data: DataConfig, folder: Path, kind: str, **changes: Any) -> Any:
    """A random model of the class as transformers saves it, next to the tokenizer of the store."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(
                0.2 * torch.randn_like(weight) if name.endswith("norm.weight") else 0.1 * torch.randn_like(weight)
            )
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((Path(data.text_store()) / "tokenizer.model").read_bytes())
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
        ("qwen3", {"head_dim": 16, "rms_norm_eps": 1e-5}),
        ("llama", {"rope_parameters": LLAMA3}),
    ],
)
def test_an_import_gives_the_logits_of_transformers(
    data: DataConfig, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    model = save_model(data, tmp_path / "theirs", kind, **changes)
    report = import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert report.target == kind
    weights = read_weights(tmp_path / "ours")
    assert weights.model.letters == ("*", "-") * 2
    tokens_BT = torch.randint(448, (1, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens_BT).logits
        actual = weights.build()(tokens_BT, PackMeta.one_document_a_row(1, 19)).logits_BTV
    # Two float32 implementations, logits of order 10.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_a_teacher_leaves_as_a_class_that_holds_it(data: DataConfig, tmp_path: Path) -> None:
    save_model(data, tmp_path / "theirs", "llama", rope_parameters=LLAMA3)
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert export_checkpoint(tmp_path / "ours", tmp_path / "out", verify=False).target == "granitemoehybrid"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"] == LLAMA3


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True cannot be imported"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True cannot be imported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu cannot be imported"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True cannot be imported"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type=linear"),
    ],
)
def test_what_our_model_has_not_is_refused(
    data: DataConfig, tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "theirs").mkdir()
    fields = SIZES | {"model_type": kind} | changes
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
