"""Distributed checkpoints that megatron-core writes become our weights and moments, and a run continues from them."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.checkpoint.manifest_file import read_manifest
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.exchange.common_file import read_common
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.exchange.conftest import Unbroken
from tests.pretrain.tiny_run import MODEL, tiny_config

MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
}
IDS_BT = torch.randint(0, 448, (1, 24), generator=torch.Generator().manual_seed(5))


def in_their_layout(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the pattern ME*- by the names of MambaModel's parameters, put together here by hand."""
    theirs = {
        "embedding.word_embeddings.weight": ours["embedding.weight"],
        "decoder.final_norm.weight": ours["final_norm.weight"],
        "output_layer.weight": ours["head.weight"],
    }
    for index, norm in enumerate(("norm", "pre_mlp_layernorm", "input_layernorm", "pre_mlp_layernorm")):
        theirs[f"decoder.layers.{index}.{norm}.weight"] = ours[f"blocks.{index}.norm.weight"]
    mixer = "decoder.layers.0.mixer."
    for name in ("A_log", "D", "dt_bias", "norm.weight", "in_proj.weight", "out_proj.weight"):
        theirs[mixer + name] = ours[f"blocks.0.mixer.{name}"]
    theirs[f"{mixer}conv1d.weight"] = ours["blocks.0.mixer.conv.weight"][:, None]
    theirs[f"{mixer}conv1d.bias"] = ours["blocks.0.mixer.conv.bias"]
    moe = "decoder.layers.1.mlp."
    theirs[f"{moe}router.weight"] = ours["blocks.1.mixer.router.weight"]
    for ours_name, number in (("up", 1), ("down", 2)):
        for expert, matrix in enumerate(ours[f"blocks.1.mixer.experts.{ours_name}"]):
            theirs[f"{moe}experts.local_experts.{expert}.linear_fc{number}.weight"] = matrix
        shared = ours[f"blocks.1.mixer.shared.{ours_name}_proj.weight"]
        theirs[f"{moe}shared_experts.linear_fc{number}.weight"] = shared
        theirs[f"decoder.layers.3.mlp.linear_fc{number}.weight"] = ours[f"blocks.3.mixer.{ours_name}_proj.weight"]
    heads = [ours[f"blocks.2.mixer.{name}_proj.weight"].view(2, -1, 8, 32) for name in "qkv"]
    theirs["decoder.layers.2.self_attention.linear_qkv.weight"] = torch.cat(heads, dim=1).view(64, 32)
    theirs["decoder.layers.2.self_attention.linear_proj.weight"] = ours["blocks.2.mixer.o_proj.weight"]
    return theirs


def write_hybrid(checkpoint: str, folder: str) -> None:
    """MambaModel and AdamW with the numbers of a checkpoint of ours, saved by megatron-core."""
    from tests.pretrain.exchange import megatron_models as megatron

    initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    shapes = {name: entry["shape"] for name, entry in read_manifest(Path(checkpoint))["parameters"].items()}
    saved = load_file(Path(checkpoint, "rank-00000.safetensors"))
    kinds = {
        kind: in_their_layout({name: saved[f"{kind}/{name}/0"].view(shape) for name, shape in shapes.items()})
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    settings = MOE | {"gated_linear_unit": False, "num_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 16}
    settings |= {"mamba_state_dim": 16, "mamba_num_groups": 2, "is_hybrid_model": True}
    with megatron.on_cpu():
        model = megatron.hybrid(megatron.transformer_config(**settings), "ME*-")
        for name, weight in model.named_parameters():
            weight.data.copy_(kinds["weight"][name])
        model.decoder.layers[1].mlp.router.expert_bias.copy_(saved["buffer/blocks.1.mixer.expert_bias"])
        optimizer = megatron.adamw(model, {kind: kinds[kind] for kind in ("exp_avg", "exp_avg_sq")})
        megatron.save(model, Path(folder), optimizer)


def write_gpt(folder: str) -> dict[str, Tensor]:
    """GPTModel, dense with stacked layers and with experts, saved by megatron-core, each with its logits."""
    from tests.pretrain.exchange import megatron_models as megatron

    initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    logits = {}
    with megatron.on_cpu():
        configs = {
            "stacked": megatron.transformer_config(),
            "singletons": megatron.transformer_config(**MOE, moe_layer_freq=[0, 1]),
        }
        for name, config in configs.items():
            model = megatron.gpt(config, num_experts=config.num_moe_experts).eval()
            for weight in model.parameters():
                weight.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(weight.numel()))
            metadata = {"singleton_local_shards": True} if name == "singletons" else {}
            megatron.save(model, Path(folder, name), **metadata)
            mask = torch.triu(torch.ones(1, 1, 24, 24, dtype=torch.bool), 1)
            with torch.no_grad():
                logits[name] = model(IDS_BT, torch.arange(24)[None], mask)
    return logits


@pytest.fixture(scope="module")
def hybrid(unbroken: Unbroken, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken run's state of step 2, as megatron-core saves it."""
    folder = tmp_path_factory.mktemp("megatron") / "iter_0000002"
    run_ranks(write_hybrid, str(unbroken.checkpoint), str(folder), num_ranks=1)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


def test_a_run_goes_on_from_a_hybrid_of_megatron(unbroken: Unbroken, hybrid: Path, tmp_path: Path) -> None:
    file, back = tmp_path / "config.yaml", tmp_path / "back"
    file.write_text(resolved_yaml(unbroken.config))
    assert run(["import", str(hybrid.parent), str(back), "--config", str(file)]) == 0
    found = diff_checkpoints(unbroken.checkpoint, back / "checkpoints" / "step-00000002")
    assert not found["tensors"] and not found["optimizer_steps"], found
    assert not found["only_in_first"] and not found["only_in_second"]
    unbroken.goes_on_in(back)


def test_missing_shards_other_shapes_and_unknown_names_are_named(
    unbroken: Unbroken, hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "config.yaml", tmp_path / "out"

    def refused(folder: Path, **model: Any) -> str:
        config = tiny_config(unbroken.config.data, out, **{f"model__{name}": value for name, value in model.items()})
        file.write_text(resolved_yaml(config))
        assert run(["import", str(folder), str(out), "--config", str(file)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "decoder.layers.3.mlp.linear_fc1.weight" in refused(hybrid, pattern="ME*")
    wider = {**MODEL["feed_forward"], "hidden_size": 56}
    assert "up_proj.weight is [48, 32], the model says [56, 32]" in refused(hybrid, feed_forward=wider)
    copy = tmp_path / "copy"
    shutil.copytree(hybrid, copy)
    common = read_common(copy / "common.pt")
    torch.save({**common, "args": Namespace(moe_router_topk=1, layernorm_epsilon=1e-3)}, copy / "common.pt")
    contradiction = refused(copy)
    assert "moe_router_topk=1 means model.moe.top_k=1, and model.moe.top_k is 2" in contradiction
    assert "layernorm_epsilon=0.001 means model.norm_epsilon=0.001" in contradiction
    next(copy.glob("*.distcp")).unlink()
    assert ".distcp is missing" in refused(copy)
    (copy / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    assert "sharded_backend='zarr'; torch_dist is read" in refused(copy)


@pytest.mark.slow
def test_logits_of_gpt_models_are_equal(data: DataConfig, tmp_path: Path) -> None:
    logits = run_ranks(write_gpt, str(tmp_path), num_ranks=1)[0]
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope"}
    dense = {"hidden_size": 48, "activation": "swiglu"}
    moe = {**MODEL["moe"], "activation": "swiglu", "auxiliary_loss_weight": 0.0, "z_loss_weight": 0.0}
    for name, pattern in (("stacked", "*-*-"), ("singletons", "*-*E")):
        model = {"vocab_size": 448, "hidden_size": 32, "pattern": pattern, "attention": attention}
        model |= {"feed_forward": dense, "norm_epsilon": 1e-5} | ({"moe": moe} if "E" in pattern else {})
        config = tiny_config(data, tmp_path / "run").model_dump(mode="json") | {"model": model}
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(config))
        assert run(["import", str(tmp_path / name), str(tmp_path / f"{name}-in"), "--config", str(file)]) == 0
        with torch.no_grad():
            ours = read_weights(tmp_path / f"{name}-in").build()(IDS_BT, PackMeta.one_document_a_row(1, 24))
        # Two float32 implementations that add in another order; logits of order 1.
        assert torch.allclose(ours.logits_BTV, logits[name], atol=1e-5, rtol=1e-5), name
