"""The installed target writes what transformers' Dots1 computes, rejects what it cannot hold, and leaves `auto` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from amfm_dots1 import TARGET

from amfm.model.config.schema import ModelConfig
from tests.helpers.examples import amfm, install_example
from tests.pretrain.tiny_run import tiny_config, tiny_data

MODEL: dict[str, Any] = {
    "pattern": "*-*E",
    "vocab_size": 512,
    "hidden_size": 32,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "qk_norm": True, "positions": "rope"},
    "feed_forward": {"hidden_size": 48, "activation": "swiglu"},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "expert_hidden_size": 16,
        "shared_expert_hidden_size": 32,
        "activation": "swiglu",
        "expert_bias": True,
    },
}


def test_what_the_class_cannot_hold_is_named() -> None:
    assert TARGET.unfit(ModelConfig.model_validate(MODEL)) == []
    (reason,) = TARGET.unfit(ModelConfig.model_validate(MODEL | {"pattern": "*E*-"}))
    assert reason.startswith("model.pattern=*E*-: layers of dots1 are pairs")
    changed = MODEL | {"attention": MODEL["attention"] | {"qk_norm": False}}
    (reason,) = TARGET.unfit(ModelConfig.model_validate(changed))
    assert reason == "model.attention.qk_norm=false: dots1 has true there; use that, or target own"


@pytest.mark.slow
def test_installed_it_exports_with_equal_logits_and_auto_does_not_choose_it(tmp_path: Path) -> None:
    packages = install_example("dots1", tmp_path / "packages")
    data = tiny_data(tmp_path / "data")
    tree = tiny_config(data, tmp_path / "run").model_dump(mode="json", exclude_unset=True)
    vocabulary = tree["model"]["vocab_size"]
    tree |= {"model": MODEL | {"vocab_size": vocabulary}, "export": {"target": "dots1"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    trained = amfm("train", "run.yaml", packages=packages, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    exported = amfm("export", "run", "out", "--json", packages=packages, cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    report = json.loads(exported.stdout)
    assert report["class"] == "Dots1ForCausalLM" and report["max_logit_difference"] < 1e-5 and report["same_argmax"]
    automatic = amfm(
        "export", "run", "auto", "--target", "auto", "--no-verify", "--json", packages=packages, cwd=tmp_path
    )
    assert json.loads(automatic.stdout)["target"] == "glm4_moe"
    missing = amfm("export", "run", "other", packages=[], cwd=tmp_path)
    assert missing.returncode == 2 and "export.target dots1 is of amfm-dots1 1.0" in missing.stderr
