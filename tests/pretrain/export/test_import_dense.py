"""A folder of a plain class is read as transformers computes it and leaves as the class that it came in as."""

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
        ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
        ("mistral", {"sliding_window": None, "head_dim": 8}),
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
    # A mistral without windows is a llama; its own class comes first.
    assert export_checkpoint(tmp_path / "ours", tmp_path / "out", verify=False).target == kind


def test_what_our_model_has_not_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama", "mlp_bias": True}))
    with pytest.raises(ValueError, match="mlp_bias=True cannot be imported"):
        import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
