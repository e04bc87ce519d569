"""What was exported comes back bitwise, what transformers changed comes back as it is, and the rest is rejected."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.kernels.moe.grouping import balance_loss
from amfm.model.config.old_names import OldNameWarning
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.pipeline_split import cut_pieces
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.export.import_huggingface import choose_depths, describe_balance, import_huggingface
from amfm.pretrain.inference.weights import load_initial_weights, read_weights, write_weights
from amfm.pretrain.train import train
from tests.pretrain.export.exported_models import MODELS, random_weights, weights_folder
from tests.pretrain.tiny_run import MODEL, tiny_config


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("target", MODELS)
def test_the_import_of_an_export_is_bit_equal(data: DataConfig, tmp_path: Path, target: str) -> None:
    source = weights_folder(data, tmp_path / "weights", target)
    export_checkpoint(source, tmp_path / "out", verify=False, max_shard_bytes=40_000)
    report = import_huggingface(tmp_path / "out", tmp_path / "back")
    before, after = read_weights(source), read_weights(tmp_path / "back")
    assert report.target == target
    assert after.model == before.model
    assert after.state.keys() == before.state.keys()
    assert all(torch.equal(after.state[name], before.state[name]) for name in before.state)
    assert after.tokenizer.identity() == before.tokenizer.identity()
    assert sum(tensor.numel() for tensor in after.state.values()) == report.num_parameters


@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=[] if name in ("own", "nemotron_h") else [pytest.mark.slow]) for name in MODELS],
)
def test_what_transformers_saves_again_is_read_without_our_description(
    data: DataConfig, tmp_path: Path, target: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = weights_folder(data, tmp_path / "weights", target)
    export_checkpoint(source, tmp_path / "out", verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.01)
        expected = model(torch.tensor([[5, 6, 7, 8]])).logits
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "amfm_model.json").exists()
    import_huggingface(tmp_path / "saved", tmp_path / "back")
    weights = read_weights(tmp_path / "back")
    with torch.no_grad():
        ours = weights.build()(torch.tensor([[5, 6, 7, 8]]), PackMeta.one_document_a_row(1, 4)).logits_BTV
    # Two float32 implementations, logits of order 10.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    text = "some of ours, \u00e9 too"
    assert weights.tokenizer.encode(text) == read_weights(source).tokenizer.encode(text)


def test_an_export_of_before_is_read_by_the_names_and_mixers_of_then(data: DataConfig, tmp_path: Path) -> None:
    source = weights_folder(data, tmp_path / "weights", "nemotron_h")
    export_checkpoint(source, tmp_path / "out", verify=False)
    model = json.loads((tmp_path / "out" / "amfm_model.json").read_text())["model"]
    model["moe"]["router_group_merit"] = model["moe"].pop("group_score_top_k")
    edit_json(tmp_path / "out" / "amfm_model.json", model=model | {"mixers": model["mixers"] | {"a_package_s": None}})
    with pytest.warns(OldNameWarning, match="router_group_merit"):
        import_huggingface(tmp_path / "out", tmp_path / "back")
    assert read_weights(tmp_path / "back").model == read_weights(source).model


def test_a_description_that_no_longer_fits_is_not_believed(data: DataConfig, tmp_path: Path) -> None:
    export_checkpoint(weights_folder(data, tmp_path / "weights", "nemotron_h"), tmp_path / "out", verify=False)
    edit_json(tmp_path / "out" / "config.json", routed_scaling_factor=3.0)
    report = import_huggingface(tmp_path / "out", tmp_path / "back")
    assert report.model.moe is not None and report.model.moe.routed_scaling == 3.0
    assert report.model.moe.auxiliary_loss_weight == 0.0, "what config.json does not say has its default"
    edit_json(tmp_path / "out" / "config.json", eos_token_id=[])
    import_huggingface(tmp_path / "out", tmp_path / "without-end")
    for model_type in ("gpt_oss", "qwen3_next"):  # which hold no such model
        edit_json(tmp_path / "out" / "config.json", model_type=model_type)
        with pytest.raises(ValueError, match="the checkpoint's tensors are not those of its configuration"):
            import_huggingface(tmp_path / "out", tmp_path / "other")


def test_foreign_classes_missing_files_and_wrong_tensors_are_refused(data: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        import_huggingface(tmp_path, tmp_path / "back")
    export_checkpoint(weights_folder(data, tmp_path / "weights", "nemotron_h"), out, verify=False)
    tensors = load_file(out / "model.safetensors")
    cut = {**tensors, "backbone.norm_f.weight": torch.ones(5)}
    save_file(cut, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"final_norm\.weight is \(5,\), the configuration states \(32,\)"):
        import_huggingface(out, tmp_path / "back")
    del cut["backbone.norm_f.weight"]
    save_file(cut, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['backbone\.norm_f\.weight'\]"):
        import_huggingface(out, tmp_path / "back")
    edit_json(out / "config.json", model_type="mamba2")
    with pytest.raises(
        ValueError,
        match=r"model_type=mamba2; known are llama, .*, deepseek_v3, .*, lfm2, lfm2_moe, gpt_oss, falcon_h1, amfm",
    ):
        import_huggingface(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "mine").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        import_huggingface(out, tmp_path / "back")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.full((32,), math.nan), r"backbone\.norm_f\.weight holds NaN or infinity"),
        (torch.full((32,), 1e300, dtype=torch.float64), r"backbone\.norm_f\.weight holds NaN or infinity in float32"),
        (torch.ones(32, dtype=torch.int32), r"backbone\.norm_f\.weight is int32; .*use the release in bf16"),
        (torch.ones(32).to(torch.float8_e4m3fn), r"backbone\.norm_f\.weight is float8_e4m3fn"),
    ],
)
def test_weights_that_are_no_sound_numbers_are_refused_by_name(
    data: DataConfig, tmp_path: Path, bad: torch.Tensor, said: str
) -> None:
    out = tmp_path / "out"
    export_checkpoint(weights_folder(data, tmp_path / "weights", "nemotron_h"), out, verify=False)
    save_file(load_file(out / "model.safetensors") | {"backbone.norm_f.weight": bad}, out / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        import_huggingface(out, tmp_path / "back")
    edit_json(out / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match="weights quantized by gptq are not read"):
        import_huggingface(out, tmp_path / "back")
    assert not any("back" in path.name for path in tmp_path.iterdir())


def test_prediction_heads_for_later_tokens_are_left_out_and_named(data: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(weights_folder(data, tmp_path / "weights", "nemotron_h"), out, verify=False)
    save_file(
        load_file(out / "model.safetensors") | {"mtp.layers.0.norm.weight": torch.ones(3)}, out / "model.safetensors"
    )
    assert import_huggingface(out, tmp_path / "back").skipped == ("mtp.layers.0.norm.weight",)


LATENT = {
    **MODEL,
    "pattern": "K-+E",
    "feed_forward": {"hidden_size": 40, "activation": "swiglu"},
    "mixers": {
        "kda": {"num_heads": 3, "head_dim": 8, "chunk_size": 16},
        "mla": {"num_heads": 3, "latent_size": 12, "nope_head_dim": 6, "rope_head_dim": 4, "value_head_dim": 8},
    },
    "moe": {**MODEL["moe"], "activation": "swiglu", "shared_expert_hidden_size": 24},
}
ROTARY = {"mixers": {"mla": LATENT["mixers"]["mla"] | {"positions": "rope", "query_latent_size": 10}}}
# As many heads of the indexer that no score is 0: of equal ones the class takes any.
CHOOSING = ROTARY["mixers"]["mla"] | {"indexer": {"top_k": 6, "num_heads": 16, "head_dim": 8}}
LATENT_MODELS = {
    "kimi_linear": LATENT,
    "deepseek_v3": LATENT | {"pattern": "+-+E"} | ROTARY,
    "deepseek_v32": LATENT | {"pattern": "+-+E", "mixers": {"mla": CHOOSING}},
}


@pytest.mark.slow
@pytest.mark.parametrize("target", LATENT_MODELS)
def test_latent_classes_are_proved_and_come_back(data: DataConfig, tmp_path: Path, target: str) -> None:
    (tmp_path / "weights").mkdir()
    weights = random_weights(data, LATENT_MODELS[target])
    write_weights(tmp_path / "weights", weights)
    report = export_checkpoint(tmp_path / "weights", tmp_path / "out")
    assert report.target == target and report.max_logit_difference < 1e-4
    import_huggingface(tmp_path / "out", tmp_path / "back")
    back = read_weights(tmp_path / "back")
    assert back.model == weights.model
    assert all(torch.equal(back.state[name], value) for name, value in weights.state.items())


def test_the_prediction_layer_behind_a_deepseek_v3_is_left_out() -> None:
    config = ModelConfig.model_validate(LATENT_MODELS["deepseek_v3"])
    tensors = {name: torch.ones(1) for name in ("model.layers.1.mlp.gate.weight", "model.layers.2.eh_proj.weight")}
    assert choose_depths(config, tensors, "deepseek_v3") == (config, ("model.layers.2.eh_proj.weight",))
    assert choose_depths(config, tensors, "kimi_linear") == (config, ())


def test_a_run_starts_from_an_import_and_then_from_its_own_checkpoint(data: DataConfig, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert train(tiny_config(data, first, train__steps=6)) == 0
    export_checkpoint(first, tmp_path / "out", verify=False)
    import_huggingface(tmp_path / "out", tmp_path / "back")
    trained = read_weights(first)

    def losses(run: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    second = tiny_config(data, tmp_path / "second", run__initial_weights=str(tmp_path / "back"), train__steps=4)
    assert train(second) == 0
    assert losses(tmp_path / "second")[0] < losses(first)[0] - 0.05, "it did not start where the first run ended"
    assert read_weights(tmp_path / "second").model == trained.model
    other = HybridModel(trained.model, single_rank_groups())
    with pytest.raises(ValueError, match=rf"data\.tokenizer\.model={re.escape(str(data.store))}/tokenizer\.model$"):
        load_initial_weights(other, first, "another")
    more = tiny_config(data, tmp_path / "second", run__initial_weights=str(tmp_path / "gone"), train__steps=5)
    assert train(more) == 0, "a resumed run has its own weights and does not read the others again"


def test_a_gpt_oss_with_biases_everywhere_is_read_trained_on_and_written(data: DataConfig, tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    released = tmp_path / "released"
    export_checkpoint(weights_folder(data, tmp_path / "weights", "gpt_oss"), tmp_path / "out", verify=False)
    class_config = GptOssConfig.from_pretrained(tmp_path / "out", attention_bias=True)
    model, generator = GptOssForCausalLM(class_config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + is_norm)
        expected = model(torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits
    model.save_pretrained(released)
    for file in (tmp_path / "out").glob("tokenizer*"):
        (released / file.name).write_bytes(file.read_bytes())
    (dropped,) = import_huggingface(released, tmp_path / "import").dropped
    assert dropped.startswith("router_aux_loss_coef=0.001 of config.json: transformers balances all blocks together")
    weights = read_weights(tmp_path / "import")
    sections = (weights.model.attention, weights.model.mixers.window, weights.model.moe)
    assert all(section is not None and section.bias for section in sections)
    with torch.no_grad():
        tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
        ours = weights.build()(tokens, PackMeta.one_document_a_row(1, 7)).logits_BTV
    # Two float32 implementations, logits of order 10.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)

    export_checkpoint(tmp_path / "import", tmp_path / "again", verify=False)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("released", "again"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)

    run = tiny_config(data, tmp_path / "run", run__initial_weights=str(tmp_path / "import"), train__steps=3)
    run = run.model_copy(update={"model": weights.model})
    assert train(RunConfig.model_validate(run.model_dump(mode="json"))) == 0
    trained = read_weights(tmp_path / "run").state
    biases = [name for name in trained if name.endswith("bias")]
    assert len(biases) == 2 + 4 + 2 * 2 and all(not torch.equal(trained[name], weights.state[name]) for name in biases)
    export_checkpoint(tmp_path / "run", tmp_path / "written", verify=False)
    import_huggingface(tmp_path / "written", tmp_path / "back")
    back = read_weights(tmp_path / "back").state
    assert all(torch.equal(back[name], trained[name]) for name in trained)


def test_initial_weights_of_another_model_or_tokenizer_are_refused(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "nemotron_h")
    identity = read_weights(folder).tokenizer.identity()
    other = {**MODEL, "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope"}}
    model = HybridModel(ModelConfig.model_validate(other), single_rank_groups())
    with pytest.raises(ValueError, match=r"attention\.positions: none there, rope here"):
        load_initial_weights(model, folder, identity)
    same = HybridModel(random_weights(data, MODEL).model, single_rank_groups(), seed=9)
    with pytest.raises(ValueError, match="was trained with tokenizer"):
        load_initial_weights(same, folder, "another")
    load_initial_weights(same, folder, identity)
    expected = read_weights(folder).state
    assert all(torch.equal(tensor, expected[name]) for name, tensor in same.state_dict().items())
    stage = HybridModel(same.config, single_rank_groups(), seed=9, pieces=cut_pieces(same.config, 2, 48)[1:])
    load_initial_weights(stage, folder, identity)
    assert 0 < len(stage.state_dict()) < len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stage.state_dict().items())


def test_a_balance_loss_of_transformers_is_that_of_one_block_and_no_sum_over_blocks() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    blocks, experts, top_k, coefficient = 3, 4, 2, 0.02
    moe = MODEL["moe"] | {"num_experts": experts, "top_k": top_k, "router": "softmax", "expert_bias": False}
    model, balanced = (
        ModelConfig.model_validate(MODEL | {"pattern": "ME*EME", "moe": moe | {"auxiliary_loss_weight": weight}})
        for weight in (0.0, 0.01)
    )
    (text,) = describe_balance({"router_aux_loss_coef": coefficient}, model)
    written = re.search(r"model\.moe\.auxiliary_loss_weight=(\S+) is as large", text)
    assert written is not None
    weight = float(written[1])
    assert describe_balance({"router_aux_loss_coef": 0.0}, model) == describe_balance({}, model) == ()
    assert describe_balance({"router_aux_loss_coef": coefficient}, balanced) == ()

    def ours(logits_RE: Tensor) -> float:
        scores_RE = logits_RE.double().softmax(-1)
        counts_E = torch.bincount(scores_RE.topk(top_k).indices.flatten(), minlength=experts)
        return float(balance_loss(scores_RE, counts_E, top_k))

    def theirs(*logits_RE: Tensor) -> float:
        return float(load_balancing_loss_func(logits_RE, experts, top_k))

    generator = torch.Generator().manual_seed(0)
    uneven_RE = torch.randn(40, experts, generator=generator) + torch.tensor([2.0, 2.0, -2.0, -2.0])
    even_RE = torch.randn(10, experts, generator=generator).repeat(experts, 1)
    even_RE = torch.cat([part_RE.roll(shift, 1) for shift, part_RE in enumerate(even_RE.split(10))])
    assert theirs(uneven_RE) == pytest.approx(top_k * ours(uneven_RE), rel=1e-6)  # float32 there
    # One block that prefers the experts that the other avoids: even to transformers, and not here.
    opposite_RE = uneven_RE.flip(1)
    assert theirs(uneven_RE, opposite_RE) == pytest.approx(top_k, rel=0.02)
    assert ours(uneven_RE) + ours(opposite_RE) > 2 * 1.5
    assert coefficient * theirs(*[even_RE] * blocks) == pytest.approx(weight * blocks * ours(even_RE), rel=1e-3)
