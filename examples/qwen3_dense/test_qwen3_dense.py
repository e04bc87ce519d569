"""The installed target writes what transformers' Qwen3 computes, refuses what it cannot hold, and leaves `auto` alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from amfm_qwen3_dense import TARGET

from amfm.model.config.schema import ModelConfig
from tests.helpers.examples import amfm, install_example
from tests.pretrain.tiny_run import tiny_config, tiny_data

DENSE = {
    "pattern": "(*-)x2",
    "vocab_size": 512,
    "hidden_size": 32,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "qk_norm": True, "positions": "rope"},
    "feed_forward": {"hidden_size": 48, "activation": "swiglu"},
}


def test_what_the_class_cannot_hold_is_named() -> None:
    assert TARGET.unfit(ModelConfig.model_validate(DENSE)) == []
    other = DENSE | {"pattern": "*-*", "feed_forward": {"hidden_size": 48}}
    assert "model.pattern" in TARGET.unfit(ModelConfig.model_validate(other))[-1]
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    reasons = TARGET.unfit(ModelConfig.model_validate(DENSE | {"attention": attention}))
    assert len(reasons) == 1 and "model.attention" in reasons[0]


@pytest.mark.slow
def test_installed_it_exports_with_equal_logits_and_auto_does_not_choose_it(tmp_path: Path) -> None:
    packages = install_example("qwen3_dense", tmp_path / "packages")
    data = tiny_data(tmp_path / "data")
    tree = tiny_config(data, tmp_path / "run").model_dump(mode="json", exclude_unset=True)
    vocabulary = tree["model"]["vocab_size"]
    tree |= {"model": DENSE | {"vocab_size": vocabulary}, "export": {"target": "qwen3_dense"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    trained = amfm("train", "run.yaml", packages=packages, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    exported = amfm("export", "run", "out", "--json", packages=packages, cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    report = json.loads(exported.stdout)
    assert report["class"] == "Qwen3ForCausalLM" and report["max_logit_difference"] < 1e-5 and report["same_argmax"]
    automatic = amfm(
        "export", "run", "auto", "--target", "auto", "--no-verify", "--json", packages=packages, cwd=tmp_path
    )
    assert json.loads(automatic.stdout)["target"] == "qwen3_next"
    missing = amfm("export", "run", "other", packages=[], cwd=tmp_path)
    assert missing.returncode == 2 and "export.target qwen3_dense is of amfm-qwen3-dense 1.0" in missing.stderr
