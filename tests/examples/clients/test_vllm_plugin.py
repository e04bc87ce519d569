"""An export with our own modelling file brings a plug-in by which vLLM serves it; what vLLM cannot serve is named by block.

`AMFM_VLLM_PYTHON` names an interpreter with vLLM (recipes/clients/vllm.txt); without it vLLM is not run.
"""

from __future__ import annotations

import os
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
from amfm_clients.check import check_export, known_faults

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.rope import YarnStretch
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.export.plugin_files import export_refusals
from amfm.pretrain.inference.weights import write_weights
from tests.model.mixers.samples import sample_options
from tests.pretrain.export.exported_models import OWN, random_weights
from tests.pretrain.tiny_run import MODEL

VLLM = os.environ.get("AMFM_VLLM_PYTHON")
ROPE = {"theta": 300.0, "fraction": 0.5}
YARN = {"factor": 4.0, "original_length": 16, "truncate": False}
# Sizes of heads that vLLM's attention has on a CPU.
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
SWIGLU = OWN["moe"] | {
    "latent_size": None,
    "expert_hidden_size": 32,
    "activation": "swiglu",
    "activation_limit": None,
}
PLAIN = OWN | {"feed_forward": {"hidden_size": 40, "activation": "swiglu"}, "moe": SWIGLU}
SERVED: dict[str, dict[str, Any]] = {
    "every choice of Mamba2, attention, experts": PLAIN
    | {"attention": OWN["attention"] | {"head_dim": 32}, "moe": SWIGLU, "tie_embeddings": True},
    "attention alone": PLAIN
    | {
        "pattern": "*-*E",
        "attention": HEADS | {"gate": "element", "positions": "rope", "rope": ROPE, "softmax_scale": 0.3},
        "moe": SWIGLU | {"router": "softmax", "expert_bias": False, "shared_expert_gate": False},
    },
    "states of two kinds, latent attention, a window": PLAIN
    | {
        "pattern": "MC+-W",
        "mixers": {
            "short_conv": {},
            "mla": {
                "num_heads": 2,
                "latent_size": 24,
                "nope_head_dim": 48,
                "rope_head_dim": 16,
                "value_head_dim": 40,
                "query_latent_size": 20,
                "positions": "rope",
                "gate": "head",
            },
            "window": HEADS | {"window": 9, "qk_norm": True, "positions": "rope", "gate": "element"},
        },
    },
    "no attention": MODEL
    | {"pattern": "M-C-", "mixers": {"short_conv": {"conv_kernel": 4}}, "multipliers": {"residual": 0.5}},
    "Gated DeltaNet": PLAIN
    | {
        "pattern": "G-*-",
        "mixers": {"gated_deltanet": {"num_heads": 4, "num_key_heads": 2, "head_dim": 128, "value_head_dim": 128}},
        "attention": HEADS,
    },
}


def export_of(model: dict[str, Any], data: DataConfig, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "weights").mkdir()
    write_weights(folder / "weights", random_weights(data, model))
    return export_checkpoint(folder / "weights", folder / "export", target="own", verify=False).path


def test_the_plugin_beside_the_weights_is_found_by_its_entry_point(data: DataConfig, tmp_path: Path) -> None:
    export = export_of(PLAIN, data, tmp_path)
    (installed,) = Distribution.discover(path=[str(export / "vllm_plugin")])
    (found,) = installed.entry_points
    assert (found.group, found.value) == ("vllm.general_plugins", "vllm_amfm:register")
    assert "PYTHONPATH=$PWD/vllm_plugin vllm serve . --enforce-eager" in (export / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"pattern": "MK*-", "mixers": {"kda": sample_options("kda")}},
            "the block kda: vLLM's part for it needs a GPU",
        ),
        ({"pattern": "M{gla}*-", "mixers": {"gla": sample_options("gla")}}, "the block gla: vLLM has no part"),
        (
            {
                "pattern": "G*",
                "mixers": {"gated_deltanet": sample_options("gated_deltanet") | {"allow_negative_eigenvalues": True}},
            },
            "allow_negative_eigenvalues=true",
        ),
        (
            {"pattern": "G*", "mixers": {"gated_deltanet": sample_options("gated_deltanet") | {"conv_kernel": 0}}},
            "conv_kernel=0",
        ),
        (
            {"pattern": "+-", "mixers": {"mla": sample_options("mla") | {"value_head_dim": 99}}},
            "value_head_dim=99 is above",
        ),
        (
            {"feed_forward": {"hidden_size": 48, "activation": "swiglu", "activation_limit": 7.0}},
            "the block feed_forward: activation_limit=7.0",
        ),
        ({"feed_forward": {"hidden_size": 48, "activation": "swiglu_oai"}}, "activation=swiglu_oai"),
        ({"pattern": "(M&*)-"}, "the block (M&*): vLLM has no part"),
        ({"pattern": "*-", "attention": MODEL["attention"] | {"sinks": True}}, "sinks=True"),
        ({"pattern": "*-", "attention": MODEL["attention"] | {"bias": True}}, "the block attention: bias=True, which"),
        (
            {"pattern": "*-", "attention": MODEL["attention"] | {"indexer": {"top_k": 4}}},
            "the block attention: indexer, which the plug-in does not compute",
        ),
        (
            {"pattern": "W-", "mixers": {"window": sample_options("window") | {"bias": True}}},
            "the block window: bias=True, which",
        ),
        (
            {"pattern": "+-", "mixers": {"mla": sample_options("mla") | {"indexer": {"top_k": 4}}}},
            "the block mla: indexer, which",
        ),
        (
            {"pattern": "W-", "mixers": {"window": sample_options("window") | {"yarn": YARN}}},
            "the block window: yarn, which",
        ),
        (
            {"pattern": "+-", "mixers": {"mla": sample_options("mla") | {"yarn": YARN}}},
            "the block mla: yarn, which",
        ),
        (
            {
                "pattern": "*-",
                "attention": MODEL["attention"]
                | {"positions": "rope", "rope": YarnStretch.model_validate(YARN).rope(90.0).model_dump()},
            },
            "the block attention: rope.yarn_truncate=false, which",
        ),
        ({"pattern": "ME*-", "moe": MODEL["moe"] | {"bias": True}}, "the block moe: bias=True, which"),
        ({"pattern": "*-"}, "heads of 8 in attention have no kernel on a CPU"),
        ({"pattern": "ME*-"}, "experts of squared ReLU"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_by_block(changes: dict[str, Any], words: str) -> None:
    config = ModelConfig.model_validate(MODEL | changes)
    assert any(
        words in str(refusal) for refusal in export_refusals(config, "own", "huggingface") if refusal.client == "vllm"
    )


def test_a_model_that_vllm_cannot_serve_gets_no_plugin(data: DataConfig, tmp_path: Path) -> None:
    export = export_of(MODEL | {"pattern": "M{gla}*-", "mixers": {"gla": sample_options("gla")}}, data, tmp_path)
    assert not (export / "vllm_plugin").exists()
    assert "the block gla" in known_faults(export, "vllm")[0].rule


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="AMFM_VLLM_PYTHON names no interpreter with vLLM")
@pytest.mark.parametrize("name", SERVED)
def test_vllm_gives_the_numbers_of_the_export(name: str, data: DataConfig, tmp_path: Path) -> None:
    report = check_export(export_of(SERVED[name], data, tmp_path), "vllm", python=VLLM)
    assert (report.outcome, report.problems, report.error) == ("equal", (), None)
    assert report.tolerance == (2e-2 if name == "Gated DeltaNet" else 1e-3)
