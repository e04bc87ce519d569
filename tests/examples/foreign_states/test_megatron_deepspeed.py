"""GPT models go to Megatron-DeepSpeed's names and back, and a program of those names computes what ours does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from amfm_foreign_states.megatron.deepspeed import check_expressible, find_blocks
from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state

from amfm.data_pipeline.config import DataConfig
from amfm.launch.cli import run
from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.packing import PackMeta
from amfm.pretrain.checkpoint.inspect import diff_checkpoints
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.inference.weights import read_weights
from tests.examples.foreign_states.conftest import Unbroken
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import tiny_config, train_and_collect

IDS = torch.randint(0, 448, (2, 24), generator=torch.Generator().manual_seed(3))
ATTENTION = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "positions": "rope"}
GATED: dict[str, Any] = {
    "pattern": "*-*-",
    "vocab_size": 448,
    "hidden_size": 32,
    "attention": ATTENTION,
    "feed_forward": {"hidden_size": 48, "activation": "swiglu"},
}
GROUPED = GATED | {
    "attention": ATTENTION | {"num_kv_heads": 2},
    "feed_forward": {"hidden_size": 48},
    "tie_embeddings": True,
}


def train_gpt(data: DataConfig, place: Path, model: dict[str, Any]) -> Unbroken:
    """Four steps of a GPT model, with a checkpoint after two."""
    tree = tiny_config(data, place / "run", train__checkpoint_every_steps=2).model_dump(mode="json")
    config = type(tiny_config(data, place)).model_validate(tree | {"model": model})
    trained = run_ranks(train_and_collect, config, num_ranks=1)[0]
    return Unbroken(config, Path(config.run.dir, "checkpoints", "step-00000002"), trained)


@pytest.fixture(scope="module")
def gated(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return train_gpt(data, tmp_path_factory.mktemp("gated"), GATED)


def export(unbroken: Unbroken, out: Path, file_format: str) -> Path:
    assert run(["export", str(unbroken.checkpoint), str(out), "--format", file_format]) == 0
    return out


def test_a_round_trip_is_bit_equal_and_what_is_missing_has_their_name(
    gated: Unbroken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file_format, name in (
        ("megatron-deepspeed", "2"),
        ("megatron-deepspeed-plain", "language_model.encoder.layers.0"),
    ):
        out = export(gated, tmp_path / file_format, file_format)
        fused = out / "global_step2" / "zero" / f"{name}.self_attention.query_key_value.weight"
        assert run(["import", str(out), str(tmp_path / f"{name}-back")]) == 0
        found = diff_checkpoints(gated.checkpoint, tmp_path / f"{name}-back" / "checkpoints" / "step-00000002")
        assert found["same"], found
        (fused / "exp_avg.pt").unlink()
        assert run(["import", str(out), str(tmp_path / "none")]) == 2
        assert (
            f"{name}.self_attention.query_key_value.weight/exp_avg.pt (blocks.0.mixer.k_proj" in capsys.readouterr().err
        )
    assert not (tmp_path / "none").exists()


def test_tensor_ranks_of_deepspeed_get_their_heads_and_channels(gated: Unbroken, tmp_path: Path) -> None:
    out = export(gated, tmp_path / "out", "megatron-deepspeed")
    weights = read_weights(gated.checkpoint).state

    def part(name: str, shape: tuple[int, ...], rank: int) -> torch.Tensor:
        """What DeepSpeed's loader gives one of two tensor ranks."""
        found = torch.empty(shape)
        address = SimpleNamespace(start=0, numel=found.numel())
        mapping = SimpleNamespace(lp_fragment_address=address, get_hp_fragment=lambda: found.view(-1))
        target = SimpleNamespace(_hp_mapping=mapping, shape=found.shape, numel=found.numel)
        load_hp_checkpoint_state(target, str(out / "global_step2" / "zero" / name), rank, 2)
        return found

    for rank in (0, 1):
        heads = [weights[f"blocks.0.mixer.{each}_proj.weight"].chunk(2)[rank] for each in "qkv"]
        assert torch.equal(part("2.self_attention.query_key_value.weight", (48, 32), rank), torch.cat(heads))
        halves = [half.chunk(2)[rank] for half in weights["blocks.1.mixer.up_proj.weight"].chunk(2)]
        assert torch.equal(part("2.mlp.dense_h_to_4h.weight", (48, 32), rank), torch.cat(halves))
        columns = weights["blocks.1.mixer.down_proj.weight"].chunk(2, dim=1)[rank]
        assert torch.equal(part("2.mlp.dense_4h_to_h.weight", (32, 24), rank), columns)
        # Padded to 512 for these ranks.
        padded = torch.nn.functional.pad(weights["embedding.weight"], (0, 0, 0, 64)).chunk(2)[rank]
        assert torch.equal(part("1.word_embeddings.weight", (256, 32), rank), padded)


def test_what_their_model_cannot_be_is_refused_by_block_and_setting(
    unbroken: Unbroken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(unbroken.checkpoint), str(tmp_path / "out"), "--format", "megatron-deepspeed"]
    assert run(command) == 2
    message = capsys.readouterr().err
    assert "pattern=ME*- has blocks E, M" in message and "E: DeepSpeed keeps the experts" in message
    assert not (tmp_path / "out").exists()
    for change, words in (
        ({"attention": ATTENTION | {"qk_norm": True}}, "model.attention.qk_norm=true"),
        ({"attention": ATTENTION | {"gate": "head"}}, "model.attention.gate=head"),
        ({"attention": ATTENTION | {"bias": True}}, "model.attention.bias=true"),
        ({"norm": "layernorm"}, "model.norm=layernorm"),
        ({"feed_forward": {"hidden_size": 48, "bias": True}}, "model.feed_forward.bias=true"),
        ({"multipliers": {"logits": 0.5}}, "model.multipliers.logits=0.5"),
        ({"pattern": "-*-*"}, "is not a row of pairs"),
        ({"pattern": "*-/*-"}, "model.num_depths=1"),
    ):
        with pytest.raises(ValueError, match=words):
            check_expressible(ModelConfig.model_validate(GATED | change), "here")


def test_the_order_of_fused_rows_is_told_by_the_program_that_wrote_them() -> None:
    attention = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8)
    newer = {"ds_sequence_parallel_fpdt": False}
    assert find_blocks(attention, Namespace(tensor_model_parallel_size=2, **newer), "here") == 2
    assert find_blocks(attention, Namespace(tensor_model_parallel_size=2), "here") == 4
    grouped = attention.model_copy(update={"num_kv_heads": 2})
    assert find_blocks(grouped, None, "here") == 2
    with pytest.raises(ValueError, match="no arguments of Megatron-DeepSpeed"):
        find_blocks(attention, None, "here")
    with pytest.raises(ValueError, match="tensor_model_parallel_size=3 does not divide 4 heads"):
        find_blocks(attention, Namespace(tensor_model_parallel_size=3, **newer), "here")


@dataclass(frozen=True)
class Case:
    model: dict[str, Any]
    kind: str
    stage: int


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case(GATED, "pipeline", 1), Case(GROUPED, "pipeline", 1), Case(GROUPED, "plain", 2), Case(GATED, "plain", 3)],
    ids=lambda case: f"{case.kind} under ZeRO {case.stage}, {'tied' if case.model is GROUPED else 'gated'}",
)
def test_a_run_goes_on_from_what_a_program_of_their_names_loaded_and_saved(
    data: DataConfig, case: Case, tmp_path: Path
) -> None:
    unbroken = train_gpt(data, tmp_path, case.model)
    formats = {"pipeline": "megatron-deepspeed", "plain": "megatron-deepspeed-plain"}
    out = export(unbroken, tmp_path / "out", formats[case.kind])
    model = unbroken.config.model
    assert model.attention is not None and model.feed_forward is not None
    job = {
        "kind": case.kind,
        "stage": case.stage,
        "ids": IDS.tolist(),
        "num_layers": 2,
        "hidden_size": 32,
        "inner_size": 48,
        "vocab_size": 448,
        # ZeRO 3 saves no padding that it could take off.
        "padded_vocab_size": 448 if case.stage == 3 else 512,
        "epsilon": model.norm_epsilon,
        "theta": model.attention.rope.theta,
        "num_heads": 4,
        "num_kv_heads": model.attention.num_kv_heads,
        "head_dim": 8,
        "is_gated": model.feed_forward.activation == "swiglu",
        "is_tied": model.tie_embeddings,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    script, saved = Path(__file__).with_name("plain_megatron_deepspeed.py"), tmp_path / "saved"
    convert = ["-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    convert += ["--input_folder", str(saved / "global_step2"), "--output_folder", str(tmp_path / "converted" / "tag")]
    for command in ([str(script), str(tmp_path), str(out), str(saved)], convert):
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        ours = read_weights(unbroken.checkpoint).build()(IDS, PackMeta.one_document_a_row(2, 24)).logits_BTV
    theirs = torch.load(tmp_path / "logits.pt")[..., : model.vocab_size]
    # Two float32 implementations that add in another order; logits of order 1.
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    file, back = tmp_path / "config.yaml", tmp_path / "back"
    file.write_text(resolved_yaml(unbroken.config))
    assert run(["import", str(tmp_path / "converted"), str(back), "--config", str(file)]) == 0
    found = diff_checkpoints(unbroken.checkpoint, back / "checkpoints" / "step-00000002")
    assert not found["tensors"] and not found["optimizer_steps"] and not found["only_in_second"]
    unbroken.goes_on_in(back)
