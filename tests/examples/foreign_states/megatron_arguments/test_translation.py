"""Arguments of Megatron-LM, written in all the ways they come in, become settings with the same meaning."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from amfm_foreign_states.megatron_arguments.sources import read_arguments
from amfm_foreign_states.megatron_arguments.translation import Translation, translate
from amfm_foreign_states.megatron_arguments.write import settings_of, summarize, write_yaml

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run
from amfm.pretrain.checks.load import load_checked
from amfm.pretrain.config.file import load_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.train import train
from tests.pretrain.tiny_run import tiny_config, tiny_data

PLAIN = "--normalization RMSNorm --disable-bias-linear --hidden-dropout 0 --attention-dropout=0 --bf16 --lr 1e-3"
SIZES = "--hidden-size 32 --num-attention-heads 4 --seq-length 48 --micro-batch-size 2 --global-batch-size 4 --train-iters 4"
MOE = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2"
EXAMPLES = {
    "hybrid": f"{PLAIN} {SIZES} {MOE} --hybrid-layer-pattern ME*-|ME/*E/*E --squared-relu --mamba-num-heads 4 --mamba-head-dim 16 "
    "--mamba-state-dim 16 --mamba-num-groups 2 --group-query-attention --num-query-groups 2 --moe-latent-size 16 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5 "
    "--position-embedding-type none --mtp-num-layers 2 --pipeline-model-parallel-size 2 --padded-vocab-size 448 "
    "--lr-decay-style WSD --lr-warmup-samples 6 --lr-wsd-decay-samples 6 --lr-decay-samples 14",
    "moe": f"{PLAIN} {SIZES} {MOE} --num-layers 4 --swiglu --position-embedding-type rope --rotary-base 1000000 --qk-layernorm "
    "--moe-layer-freq ([0]*2+[1]*2) --moe-router-pre-softmax --moe-shared-expert-intermediate-size 16 --vocab-size 440 "
    "--make-vocab-size-divisible-by 64 --lr-decay-style cosine --min-lr 1e-4 --untie-embeddings-and-output-weights",
    "latent": f"{PLAIN} {SIZES} {MOE} --num-layers 2 --swiglu --multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 "
    "--qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 8 --position-embedding-type rope --moe-router-num-groups 2 "
    "--moe-router-group-topk 1 --moe-router-score-function sigmoid --vocab-size 448 --make-vocab-size-divisible-by 64",
    "linear": f"{PLAIN} {SIZES} {MOE} --num-layers 4 --swiglu --experimental-attention-variant gated_delta_net "
    "--linear-attention-freq 4 --linear-num-key-heads 2 --linear-num-value-heads 4 --linear-key-head-dim 16 --padded-vocab-size 448 "
    "--linear-value-head-dim 16 --attention-output-gate --position-embedding-type rope --rotary-percent 0.5",
}  # fmt: skip

# Sizes of a small model, in place of those that are given.
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8, "ffn_hidden_size": 48, "vocab_size": 448,
    "seq_length": 48, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 2, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8, "v_head_dim": 8, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_moe_experts": 8,
    "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 16, "moe_latent_size": 16, "moe_router_topk": 2,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1, "sequence_parallel": False,
    "cuda_graph_impl": "none",
}  # fmt: skip


def of(text: str, folder: Path, name: str = "args.txt") -> Translation:
    (folder / name).write_text(text, encoding="utf-8")
    return translate(read_arguments(folder / name))


def values(translated: Translation) -> dict[str, Any]:
    return {found.setting: found.value for found in settings_of(translated)}


def test_a_hybrid_keeps_its_pattern_experts_and_schedule(tmp_path: Path) -> None:
    found = values(of(EXAMPLES["hybrid"], tmp_path))
    expected = {
        "model.pattern": "ME*-|ME/*E/*E",
        "model.tie_embeddings": True,
        "model.attention.num_kv_heads": 2,
        "model.feed_forward.hidden_size": 128,
        "model.moe.routed_scaling": 2.5,
        "model.moe.sequence_loss_weight": 0.01,
        "model.moe.auxiliary_loss_weight": 0.0,
        "model.mtp.loss_weight": 0.1,
        "optimizer.beta2": 0.999,
        "optimizer.weight_decay": 0.01,
        "data.mask_document_boundaries": False,
        "schedule.decay_shape": "exponential",
        "schedule.warmup_steps": 1.5,
        "schedule.decay_steps": 1.5,
        "schedule.decay_end_step": 3.5,
    }
    assert {setting: found.get(setting) for setting in expected} == expected


def test_layers_of_gpt_models_are_written_out(tmp_path: Path) -> None:
    found = {name: values(of(text, tmp_path)) for name, text in EXAMPLES.items()}
    assert found["moe"]["model.pattern"] == "*-*-*E*E"
    assert found["latent"]["model.pattern"] == "+E+E"
    assert found["linear"]["model.pattern"] == "GEGEGE*E"
    assert found["moe"]["model.vocab_size"] == 448 and found["moe"]["model.moe.normalize_probabilities"] is False
    assert found["moe"]["schedule.min_ratio"] == pytest.approx(0.1)
    assert found["latent"]["model.moe.group_score_top_k"] == 2
    assert found["linear"]["model.attention.gate"] == "element"


def test_a_script_is_followed_and_not_run(tmp_path: Path) -> None:
    script = f"""#!/bin/bash
    touch {tmp_path}/ran; SCALE="big"   # a warning --hidden-size 7
    case "${{SCALE}}" in
        "small")
            WIDTH=16
            ;;
        "big")
            WIDTH=$((16 * 2)); HEADS=4
            ;;
    esac
    GPT_ARGS=(
        --num-layers 4   # two more
        "--hidden-size ${{WIDTH}}"
        --seq-length ${{LENGTH:-48}}
    )
    if [ "$X" = 1 ]; then
        GPT_ARGS+=(--swiglu)
    fi
    options=" \\
       --num-attention-heads 4 \\
       --lr 1e-3 --no-rope-fusion --data-path 0.3 $DATA/one 0.7 $DATA/two"
    torchrun --nproc_per_node 8 pretrain_gpt.py ${{GPT_ARGS[@]}} ${{options}} 2>&1 | tee log.txt
    """
    translated = of(script, tmp_path, "train.sh")
    assert not (tmp_path / "ran").exists()
    given = dict(translated.given.given)
    assert given.pop("data_path") == [0.3, "$DATA/one", 0.7, "$DATA/two"]
    assert given == {
        "num_layers": 4, "hidden_size": 32, "seq_length": 48, "swiglu": True, "num_attention_heads": 4, "lr": 1e-3, "rope_fusion": False
    }  # fmt: skip
    sources = values(translated)["data.sources"]
    assert [(each["paths"], each["weight"]) for each in sources] == [(["$DATA/one.idx"], 0.3), (["$DATA/two.idx"], 0.7)]


def test_a_log_bridge_and_a_mapping_of_flags_are_read(tmp_path: Path) -> None:
    names = "num_layers hidden_size num_attention_heads seq_length lr kv_channels swiglu add_bias_linear bf16 seed group_query_attention"
    printed = "\n".join(
        f"  {name} {'.' * 20} {value}"
        for name, value in zip(names.split(), (2, 32, 4, 48, 0.001, 16, True, False, True, 1, False))
    )
    log = of(printed, tmp_path, "log.txt")
    assert values(log)["model.attention.head_dim"] == 16 and log.given.is_record
    bridge = {
        "model": {
            "_target_": "x", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "num_moe_experts": 4,
            "gated_linear_unit": True, "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"}, "vocab_size": 448,
            "add_bias_linear": False, "normalization": "RMSNorm", "share_embeddings_and_output_weights": False, "seq_length": 48,
        },
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1}, "scheduler": {"end_weight_decay": 0.033, "start_weight_decay": 0.033},
        "train": {"train_iters": 4, "micro_batch_size": 2, "global_batch_size": 4}, "mixed_precision": "bf16_mixed",
    }  # fmt: skip
    found = values(of(yaml.safe_dump(bridge), tmp_path, "run_config.yaml"))
    assert found["model.pattern"] == "*E*E" and found["model.moe.activation"] == "swiglu"
    assert found["optimizer.weight_decay"] == 0.033 and found["train.precision"] == "bf16"
    assert found["model.attention.num_kv_heads"] == 2 and found["model.tie_embeddings"] is False
    flags = {"MODEL_ARGS": {"--num-layers": 2, "--hidden-size": 32, "--num-attention-heads": 4, "--swiglu": True}}
    assert values(of(yaml.safe_dump(flags), tmp_path, "model_config.yaml"))["model.pattern"] == "*-*-"


def test_what_is_missing_or_only_near_is_written_and_counted(tmp_path: Path) -> None:
    given = of(
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --tp-comm-overlap --unheard-of 3 --fp16", tmp_path
    )
    text = write_yaml(given)
    assert "[H] --tp-comm-overlap True" in text and "[M] --hidden-dropout 0.1 (a default)" in text
    assert "Not known, and left out: --unheard-of" in text
    assert "activation: gelu_tanh  # default of Megatron-LM (--swiglu)" in text
    assert "beta2: 0.999  # default of Megatron-LM (--adam-beta2)" in text
    assert summarize(given) == {
        "equal": 2, "differs": 1, "missing": 2, "H": 1, "M": 0, "L": 1, "unknown": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "",
            {
                "feed_forward.activation": "gelu_tanh",
                "feed_forward.bias": True,
                "norm": "layernorm",
                "attention.bias": True,
            },
        ),
        (
            "--disable-bias-linear",
            {"feed_forward.activation": "gelu", "feed_forward.bias": False, "attention.bias": False},
        ),
        ("--no-bias-gelu-fusion --add-qkv-bias", {"feed_forward.activation": "gelu", "attention.bias": True}),
        ("--disable-bias-linear --add-qkv-bias --normalization RMSNorm", {"attention.bias": "qkv", "norm": "rmsnorm"}),
        ("--num-experts 4", {"moe.activation": "gelu", "moe.bias": True}),
        ("--activation-func gelu --gated-linear-unit", {"feed_forward.activation": "geglu"}),
        ("--activation-func gelu --gated-linear-unit --no-bias-gelu-fusion", {"feed_forward.activation": "geglu_erf"}),
    ],
)
def test_norms_biases_and_gelu_are_those_that_the_program_computes(
    flags: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    """GELU is tanh's form where biases are added in one kernel, and the exact one elsewhere; none of it is approximated."""
    translated = of(f"--num-layers 2 --hidden-size 32 --num-attention-heads 4 {flags}", tmp_path)
    found = {name: translated.lines[f"model.{name}"] for name in expected}
    assert {name: line.value for name, line in found.items()} == expected
    assert not any(line.is_approximate for line in found.values())


OVERLAP = "--expert-model-parallel-size 2 --num-experts 4 --overlap-moe-expert-parallel-comm"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--tensor-model-parallel-size 2 --sequence-parallel", "blocks"),
        ("--expert-model-parallel-size 2 --num-experts 4", "blocks"),
        ("--pipeline-model-parallel-size 2", "none"),
        ("--context-parallel-size 2", "none"),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", "none"),
        ("--bf16 --fp8-format e4m3 --fp8-recipe blockwise", "none"),
        (f"{OVERLAP} --micro-batch-size 2", "none"),
        (f"{OVERLAP} --micro-batch-size 1", "blocks"),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", "none"),
    ],
)
def test_graphs_stay_where_the_check_takes_them(flags: str, expected: str, tmp_path: Path) -> None:
    given = f"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --cuda-graph-impl local {flags}"
    found = of(given, tmp_path).lines["train.cuda_graphs"]
    assert (found.value, found.is_approximate) == (expected, expected == "none")


def test_no_validation_is_none(tmp_path: Path) -> None:
    found = values(
        of("--num-layers 2 --hidden-size 32 --num-attention-heads 4 --eval-iters 0 --eval-interval 10", tmp_path)
    )
    assert found["train.validate_every_steps"] is None and found["train.validation_batches"] == 1


def test_what_only_is_near_of_norms_and_units_is_named_and_a_null_tokenizer_is_its_end(tmp_path: Path) -> None:
    given = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --qk-layernorm --quick-geglu"
    translated = of(f"{given} --tokenizer-type NullTokenizer --vocab-size 511", tmp_path)
    assert "RMSNorms here" in translated.lines["model.norm"].note
    assert "without glu_linear_offset" in translated.lines["model.feed_forward.activation"].note
    assert translated.lines["data.tokenizer.eos_token"].value == 511
    assert not [found for found in translated.missing if found.name == "tokenizer_type"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--hidden-size 32", "neither hybrid_layer_pattern nor num_layers"),
        ("--num-layers $LAYERS --hidden-size 8 --num-attention-heads 1", "num_layers='\\$LAYERS' is not a number"),
        ("--num-layers 2 --hidden-size 8 --num-attention-heads 1 --lr abc", "lr='abc' is not a number"),
        ("--num-layers 9999999 --hidden-size 8 --num-attention-heads 1", "num_layers=9999999"),
        (
            "--num-layers 2 --hidden-size 8 --num-attention-heads 1 --num-experts 2 --moe-layer-freq [0]*99999",
            "written as",
        ),
        ("nothing of that kind", "has no flags"),
    ],
)
def test_bad_input_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        of(text, tmp_path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_verb_writes_a_configuration_that_can_be_planned(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "args.txt", tmp_path / "run.yaml"
    source.write_text(EXAMPLES[name], encoding="utf-8")
    assert run(["import", "megatron-args", str(source), str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["to_correct"] is None and answer["unknown"] == 0
    config = load_checked(out, ["data.tokenizer.vocab_size=448"], world_size=load_config(out).parallel.pipeline)
    assert config.model.hidden_size == 32
    assert run(["import", "megatron-args", str(source), str(out)]) == 2  # it exists


def scaled(config: RunConfig, data: DataConfig, folder: Path) -> RunConfig:
    """The same run on one rank with the tests' data; sizes are small already."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree |= {"run": {"dir": str(folder)}, "data": data.model_dump(mode="json"), "parallel": {}}
    tree["train"] |= {"precision": "float32", "validate_every_steps": None, "keep_every_steps": None}
    return RunConfig.model_validate(tree)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_small_translated_run_trains_four_steps(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(write_yaml(of(EXAMPLES[name], tmp_path)), encoding="utf-8")
    config = scaled(load_config(tmp_path / "run.yaml"), tiny_data(tmp_path / "data"), tmp_path / "run")
    assert train(config) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(each)["step"] for each in lines if "loss" in json.loads(each)][-1] == 4


def examples() -> list[Path]:
    """Functional tests and examples of a checkout that describe a hybrid or a model with experts."""
    root = Path(os.environ["MEGATRON_LM"])
    cases = (root / "tests/functional_tests/test_cases").glob("*/*/model_config.yaml")
    found = [
        path
        for path in sorted([*cases, *(root / "examples").rglob("*.sh")])
        # Others have the arguments of a checkpoint, and mimo's scripts the models of a program.
        if "mimo" not in str(path)
        and re.search("--(num-experts|hybrid-)", text := path.read_text())
        and re.search("--(num-layers|hybrid-)", text)
    ]
    assert len(found) > 100
    return found


needs_checkout = pytest.mark.skipif(
    "MEGATRON_LM" not in os.environ, reason="needs MEGATRON_LM, a checkout of Megatron-LM"
)


@pytest.mark.slow
@needs_checkout
def test_hybrid_and_moe_examples_of_a_checkout_can_be_planned(tmp_path: Path) -> None:
    faults = []
    for source in examples():
        out = tmp_path / "run.yaml"
        out.write_text(write_yaml(translate(read_arguments(source))), encoding="utf-8")
        parallel = load_config(out).parallel
        ranks = parallel.tensor * parallel.context * parallel.pipeline
        if "inference" not in str(source) and not can_be_planned(out, ranks):
            faults.append(str(source))
    # Its 8,191 tokens are not a multiple of its eight tensor ranks.
    assert [Path(each).name for each in faults] == ["nemotron5_56b.sh"]


def scaled_down(source: Path, out: Path) -> RunConfig:
    """An example's model with few layers of small sizes, each kind of layer once."""
    arguments = read_arguments(source)
    given = dict(arguments.given) | {name: value for name, value in SMALL.items() if name in arguments.given}
    pattern = given.get("hybrid_layer_pattern")
    if pattern:
        main, *depths = str(pattern).replace("|", "").split("/")
        given["hybrid_layer_pattern"] = "/".join(["".join(dict.fromkeys(main)), *depths])
    given["num_layers"] = len(dict.fromkeys(str(pattern).split("/")[0].replace("|", ""))) if pattern else 4
    if "M" in str(pattern):
        given |= {name: size for name, size in SMALL.items() if name.startswith("mamba_")}
    if "moe_layer_freq" in given:
        given["moe_layer_freq"] = "[0,1,1,1]"
    out.write_text(write_yaml(translate(replace(arguments, given=given))), encoding="utf-8")
    return load_config(out)


@pytest.mark.slow
@needs_checkout
def test_models_of_the_examples_scaled_down_train_four_steps(tmp_path: Path) -> None:
    data, faults = tiny_data(tmp_path / "data"), []
    found = {source: scaled_down(source, tmp_path / "run.yaml") for source in examples()}
    models = {config.model.model_dump_json(): (source, config) for source, config in found.items()}
    for number, (source, config) in enumerate(models.values()):
        folder = tmp_path / str(number)
        tree = tiny_config(data, folder).model_dump(mode="json")
        tree |= {"model": config.model.model_dump(mode="json", exclude_unset=True) | {"vocab_size": 448}}
        tree |= {"optimizer": config.optimizer.model_dump(mode="json", exclude_unset=True)}
        code = train(RunConfig.model_validate(tree))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if code or [line["step"] for line in lines if "loss" in line][-1] != 4:
            faults.append(str(source))
    assert len(models) > 10 and not faults


def can_be_planned(path: Path, ranks: int) -> bool:
    """Whether a configuration passes the checks of a plan on some multiple of so many ranks."""
    for factor in (1, 2, 4, 8, 16, 32, 64, 128):
        try:
            load_checked(path, [], world_size=ranks * factor)
        except ValueError:
            continue
        return True
    return False
