"""Distributed checkpoints that megatron-core writes become our weights and moments, and a run continues from them."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from amfm_foreign_states.adopt import Expected, adopt, describe_position, import_state
from amfm_foreign_states.megatron.write import export_megatron
from amfm_foreign_states.state import WrittenRun, write_run
from amfm_foreign_states.torch_file import read_common
from safetensors.torch import load_file
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.loader.loader import SourceUse
from amfm.launch.cli import run
from amfm.model.config.moe import BIAS_CHANNELS
from amfm.model.on_demand import Source, source_of
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.checkpoint.manifest_file import read_manifest
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.inference.weights import read_weights
from amfm.pretrain.parallel import initialize_parallel
from tests.examples.foreign_states.conftest import Unbroken
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
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
MAMBA: dict[str, Any] = {
    "gated_linear_unit": False,
    "num_layers": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_state_dim": 16,
    "mamba_num_groups": 2,
    "is_hybrid_model": True,
}
NEWER: dict[str, Any] = {
    "moe_layer_freq": [0, 1],
    "moe_latent_size": 16,
    "attention_output_gate": True,
    "qk_layernorm": True,
    "mtp_num_layers": 1,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "num_query_groups": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
}
# As Megatron-LM's own defaults have it: LayerNorm, biases, and GELU by a fused kernel.
OLDER: dict[str, Any] = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
    "bias_activation_fusion": True,
}
# Experts do not have that kernel, and no shared expert has biases.
BIASED: dict[str, Any] = {
    "moe_layer_freq": [0, 1],
    "bias_activation_fusion": False,
    "moe_shared_expert_intermediate_size": None,
}
OUR_LATENT: dict[str, Any] = {
    "num_heads": 4,
    "latent_size": 12,
    "query_latent_size": 16,
    "nope_head_dim": 8,
    "rope_head_dim": 4,
    "value_head_dim": 8,
    "positions": "rope",
    "latent_norm_epsilon": 1e-5,
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
    from tests.examples.foreign_states import megatron_models as megatron

    initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    shapes = {name: entry["shape"] for name, entry in read_manifest(Path(checkpoint))["parameters"].items()}
    saved = load_file(Path(checkpoint, "rank-00000.safetensors"))
    kinds = {
        kind: in_their_layout({name: saved[f"{kind}/{name}/0"].view(shape) for name, shape in shapes.items()})
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    settings = MOE | MAMBA
    with megatron.on_cpu():
        model = megatron.hybrid(megatron.transformer_config(**settings), "ME*-")
        for name, weight in model.named_parameters():
            weight.data.copy_(kinds["weight"][name])
        model.decoder.layers[1].mlp.router.expert_bias.copy_(saved["buffer/blocks.1.mixer.expert_bias"])
        optimizer = megatron.adamw(model, {kind: kinds[kind] for kind in ("exp_avg", "exp_avg_sq")})
        megatron.save(model, Path(folder), optimizer)


def write_gpt(folder: str) -> dict[str, Tensor]:
    """GPTModel, dense with stacked layers and with experts, saved by megatron-core, each with its logits."""
    from tests.examples.foreign_states import megatron_models as megatron

    initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    logits = {}
    with megatron.on_cpu():
        configs = {
            "stacked": megatron.transformer_config(),
            "singletons": megatron.transformer_config(**MOE, moe_layer_freq=[0, 1]),
            "older": megatron.transformer_config(**OLDER),
            "biased": megatron.transformer_config(**MOE | OLDER | BIASED),
            "latent": megatron.transformer_config(**LATENT),
            "windowed": megatron.transformer_config(window_size=(4, 0)),
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


def test_a_run_goes_on_from_a_hybrid_of_megatron(
    unbroken: Unbroken, hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, back = tmp_path / "config.yaml", tmp_path / "back"
    file.write_text(resolved_yaml(unbroken.config))
    assert run(["import", str(hybrid.parent), str(back), "--config", str(file)]) == 0
    assert "tokens that are left of this epoch" in capsys.readouterr().out
    found = diff_checkpoints(unbroken.checkpoint, back / "checkpoints" / "step-00000002")
    assert not found["tensors"] and not found["optimizer_steps"], found
    assert not found["only_in_first"] and not found["only_in_second"]
    unbroken.goes_on_in(back)


# What GPTModel of megatron-core has on a CPU, and what only a hybrid has.
PAIRS = "G-*E/*E"
HYBRID = "MG*-E/*E"
OLDER_PAIRS = "+-*-WE/*E"


def drawn(config: RunConfig, out: Path) -> Path:
    """A checkpoint of step 2 with drawn weights, moments and biases, all different."""
    expected, draw = Expected(config), torch.Generator().manual_seed(3)

    def sources(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
        found = {name: torch.randn(shape, generator=draw).abs() for name, shape in shapes.items()}
        if config.model.moe is not None and config.model.moe.bias:
            for name, tensor in found.items():
                if name.endswith("experts.up"):  # behind the column of biases are zeros
                    tensor[..., 1 - BIAS_CHANNELS :] = 0.0
                if name.endswith("experts.down"):
                    tensor[:, -BIAS_CHANNELS:] = 0.0
        return {name: source_of(tensor) for name, tensor in found.items()}

    tensors = {kind: sources(expected.shapes) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    state = adopt(config, "drawn", tensors, sources(expected.buffers), 2)
    return write_run(out, state).checkpoint


def newer_blocks(config: RunConfig, pattern: str) -> RunConfig:
    """The same run of a model with Gated DeltaNet, gates of attention, latent experts and depths of prediction."""
    model = config.model.model_dump(mode="json", exclude_unset=True) | {"pattern": pattern}
    model["attention"] |= {"gate": "element", "qk_norm": True}
    model["moe"] |= {"latent_size": 16, "activation": "swiglu"}
    model["feed_forward"] |= {"activation": "swiglu"}
    model["mixers"] = {"gated_deltanet": {"num_heads": 4, "num_key_heads": 2, "head_dim": 8, "value_head_dim": 8}}
    return RunConfig.model_validate(config.model_dump(mode="json", exclude={"model"}) | {"model": model})


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two checkpoints have the same weights, moments and buffers."""
    found = diff_checkpoints(first, second)
    names = ("tensors", "optimizer_steps", "only_in_first", "only_in_second")
    return not any(found[name] for name in names)


def older_blocks(config: RunConfig, pattern: str) -> RunConfig:
    """The same run of a model with LayerNorms, GELU and biases, windows and latent attention."""
    model = config.model.model_dump(mode="json", exclude_unset=True) | {"pattern": pattern, "norm": "layernorm"}
    model["attention"] |= {"bias": True}
    model["moe"] |= {"activation": "gelu", "bias": True}
    model["feed_forward"] |= {"activation": "gelu_tanh", "bias": True}
    window = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 5, "bias": "qkv"}
    model["mixers"] = {"mla": OUR_LATENT, "window": window}
    return RunConfig.model_validate(config.model_dump(mode="json", exclude={"model"}) | {"model": model})


@pytest.mark.parametrize(
    ("pattern", "is_gpt", "precision"),
    [(PAIRS, True, "bf16"), (HYBRID, False, "float32"), (OLDER_PAIRS, True, "float32")],
)
def test_what_is_exported_comes_back_bit_equal(
    unbroken: Unbroken, tmp_path: Path, pattern: str, *, is_gpt: bool, precision: str
) -> None:
    config = (older_blocks if pattern == OLDER_PAIRS else newer_blocks)(unbroken.config, pattern)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    checkpoint = drawn(config, tmp_path / "drawn")
    exported = export_megatron(checkpoint, tmp_path / "there", is_gpt=is_gpt)
    back = import_state(exported.path, tmp_path / "back", config)
    assert isinstance(back, WrittenRun) and back.step == 2
    assert same_tensors(checkpoint, back.checkpoint)


@pytest.mark.slow
def test_a_run_goes_there_and_back(unbroken: Unbroken, tmp_path: Path) -> None:
    there, back, file = tmp_path / "there", tmp_path / "back", tmp_path / "config.yaml"
    file.write_text(resolved_yaml(unbroken.config))
    assert run(["export", str(unbroken.checkpoint), str(there), "--format", "torch-dist"]) == 0
    assert run(["import", str(there), str(back), "--config", str(file)]) == 0
    assert same_tensors(unbroken.checkpoint, back / "checkpoints" / "step-00000002")
    unbroken.goes_on_in(back)


def test_what_is_read_twice_and_never_is_a_number() -> None:
    uses = [SourceUse(0, "web", 30, 3000, 0.75), SourceUse(0, "books", 10, 1000, 2.0)]
    (web,) = describe_position(uses, 5, 5)
    assert "source 'web': 0.75 epochs (3,000 tokens)" in web
    assert "Of the 1,000 tokens that are left of this epoch about 750 were read before" in web
    again = list(describe_position([], 2, 5))
    assert again == [
        "the other program made 5 steps and the run counts it as step 2: what it read in the 3 steps between comes again"
    ]


def test_models_without_a_place_there_are_refused(
    unbroken: Unbroken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(unbroken.checkpoint), str(tmp_path / "out"), "--format", "torch-dist-gpt"]) == 2
    assert "model.pattern=ME*- has no layers of GPTModel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def through_megatron(folders: list[tuple[str, str, str]]) -> None:
    """Load exports into models and optimizers of megatron-core, and save what they hold in its own form."""
    from tests.examples.foreign_states import megatron_models as megatron

    initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    for kind, source, target in folders:
        with megatron.on_cpu():
            if kind == "gpt":
                model: torch.nn.Module = megatron.gpt_of_newer_blocks(megatron.transformer_config(**MOE, **NEWER))
            else:
                model = megatron.hybrid(megatron.transformer_config(**MOE, **MAMBA), "ME*-")
            megatron.load_and_save(model, Path(source), Path(target))


@pytest.mark.slow
def test_megatron_core_loads_exports_and_saves_the_same_numbers(unbroken: Unbroken, tmp_path: Path) -> None:
    config = newer_blocks(unbroken.config, PAIRS)
    runs = {"gpt": (config, drawn(config, tmp_path / "drawn")), "hybrid": (unbroken.config, unbroken.checkpoint)}
    folders = []
    for kind, (_, checkpoint) in runs.items():
        exported = export_megatron(checkpoint, tmp_path / kind, is_gpt=kind == "gpt")
        folders.append((kind, str(exported.path / "iter_0000002"), str(tmp_path / f"{kind}-saved")))
    run_ranks(through_megatron, folders, num_ranks=1)
    for kind, (config, checkpoint) in runs.items():
        back = import_state(tmp_path / f"{kind}-saved", tmp_path / f"{kind}-back", config)
        assert isinstance(back, WrittenRun)
        assert same_tensors(checkpoint, back.checkpoint), kind


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
    assert "up_proj.weight is [48, 32], the model states [56, 32]" in refused(hybrid, feed_forward=wider)
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
    older = {"norm": "layernorm", "attention": {**attention, "bias": True}}
    older |= {"feed_forward": {"hidden_size": 48, "activation": "gelu_tanh", "bias": True}}
    cases: dict[str, dict[str, Any]] = {
        "stacked": {"pattern": "*-*-", "attention": attention},
        "singletons": {"pattern": "*-*E", "attention": attention, "moe": moe},
        "older": {"pattern": "*-*-", **older},
        "biased": {
            "pattern": "*-*E",
            **older,
            "feed_forward": {"hidden_size": 48, "activation": "gelu", "bias": True},
            "moe": {**moe, "activation": "gelu", "bias": True, "shared_expert_hidden_size": 0},
        },
        "latent": {"pattern": "+-+-", "mixers": {"mla": OUR_LATENT}},
        # Their window does not count the token itself.
        "windowed": {"pattern": "W-W-", "mixers": {"window": {**attention, "window": 5}}},
    }
    for name, changes in cases.items():
        model = {"vocab_size": 448, "hidden_size": 32, "feed_forward": dense, "norm_epsilon": 1e-5, **changes}
        config = tiny_config(data, tmp_path / "run").model_dump(mode="json") | {"model": model}
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(config))
        assert run(["import", str(tmp_path / name), str(tmp_path / f"{name}-in"), "--config", str(file)]) == 0
        with torch.no_grad():
            ours = read_weights(tmp_path / f"{name}-in").build()(IDS_BT, PackMeta.one_document_a_row(1, 24))
        # Two float32 implementations that add in another order; logits of order 1.
        assert torch.allclose(ours.logits_BTV, logits[name], atol=1e-5, rtol=1e-5), name
