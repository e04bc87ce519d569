"""An export is what was trained, or it does not exist: loaded by transformers, compared, whole, rejected when in use."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from amfm.data_pipeline.config import DataConfig, PhaseConfig
from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.tokenizer.tokenizer import read_tokenizer_file
from amfm.model.huggingface.classes import weight_map
from amfm.model.packing import PackMeta
from amfm.pretrain.export import export
from amfm.pretrain.export.export import LOGIT_TOLERANCE, export_checkpoint
from amfm.pretrain.export.files import begin_export, put_in_place
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.inference.weights import read_weights, write_weights
from amfm.pretrain.train import train
from tests.helpers.full_disk import largest_file
from tests.helpers.tiny_store import make_text
from tests.pretrain.export.exported_models import MODELS, QWEN3_NEXT, random_weights, weights_folder
from tests.pretrain.tiny_run import MODEL, tiny_config

# What all share is in these two; each target's names and sizes are compared by its import, which is quick for all.
QUICK_TARGETS = ("own", "nemotron_h")
OTHERS = ("granitemoehybrid", "qwen3_next")


def sample_text() -> str:
    return make_text(np.random.default_rng(5), 40)


def load_with_transformers(folder: Path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    assert not any(info.values()), info
    return model


def test_a_trained_run_exports_with_equal_logits_on_validation_text(data: DataConfig, tmp_path: Path) -> None:
    assert train(tiny_config(data, tmp_path / "run")) == 0
    report = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert report.class_name == "NemotronHForCausalLM"
    assert report.max_logit_difference is not None and report.max_logit_difference <= LOGIT_TOLERANCE
    assert report.same_argmax
    assert report.compared.startswith("the validation part of")
    assert not (tmp_path / ".out.amfm-export").exists()
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= set(report.files)
    assert any(refusal.startswith("vLLM") for refusal in report.refusals)
    assert report.refusals[0] in (tmp_path / "out" / "README.md").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| Training | 4 steps, " in card
        and "| Optimizer | AdamW, peak rate 0.003, schedule wsd, 4 sequences per step |" in card
    )
    assert "| Validation loss | " in card
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == read_weights(tmp_path / "run").tokenizer.eos_id


@pytest.mark.slow
@pytest.mark.parametrize("target", MODELS)
def test_each_target_is_proved_in_a_fresh_process(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """As users do. Quick, by the same program in a fork: `test_a_trained_run_exports_with_equal_logits_on_validation_text`, and
    test_verify.py's `test_a_failed_proof_is_a_failed_export_and_leaves_no_folder` for the target own, whose logits are
    compared in test_modeling_mixers.py.
    """
    monkeypatch.setattr(export, "subprocess", subprocess)
    report = export_checkpoint(weights_folder(data, tmp_path / "weights", target), tmp_path / "out")
    assert report.target == target
    assert report.max_logit_difference is not None and report.max_logit_difference <= LOGIT_TOLERANCE
    assert report.same_argmax


@pytest.mark.parametrize("target", ["own", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_card_says_why_a_target_was_taken(data: DataConfig, tmp_path: Path, target: str) -> None:
    report = export_checkpoint(weights_folder(data, tmp_path / "weights", target), tmp_path / "out", verify=False)
    assert report.target == target
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("trust_remote_code=True" in card) == (target == "own")
    if target == "own":
        assert any("qk_norm=true" in reason for reason in report.reasons)
        assert "qk_norm=true" in card, "the model card must say why no native class fits"
        assert (tmp_path / "out" / "modeling_amfm.py").is_file()


@pytest.mark.slow
def test_factored_matrices_are_written_multiplied_out_and_proved(data: DataConfig, tmp_path: Path) -> None:
    feed_forward = {"hidden_size": 48, "linear_kind": "blockshuffle", "linear_blocks": 4}
    shared = {"shared_expert_linear_kind": "lowrank", "shared_expert_linear_rank": 6}
    weights = random_weights(data, MODEL | {"feed_forward": feed_forward, "moe": MODEL["moe"] | shared})
    (tmp_path / "weights").mkdir()
    write_weights(tmp_path / "weights", weights)
    report = export_checkpoint(tmp_path / "weights", tmp_path / "out")
    assert report.class_name == "NemotronHForCausalLM"
    assert report.max_logit_difference is not None and report.max_logit_difference <= LOGIT_TOLERANCE
    back = import_huggingface(tmp_path / "out", tmp_path / "back")
    assert back.model.feed_forward is not None and back.model.feed_forward.linear_kind == "dense"


@pytest.mark.parametrize("verify", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_qwen3_5_moe_takes_byte_level_bpe_alone_and_is_proved_with_it(
    data: DataConfig, tmp_path: Path, verify: bool
) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    weights = random_weights(data, QWEN3_NEXT | {"pattern": "GE*E"})
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    write_weights(tmp_path / "first", weights)
    with pytest.raises(ValueError, match=r"tokenizer is a SentencePiece model.*or target qwen3_next"):
        export_checkpoint(tmp_path / "first", tmp_path / "out", target="qwen3_5_moe")
    letters = {letter: index for index, letter in enumerate([*bytes_to_unicode().values(), "<|endoftext|>", "th"])}
    Qwen3_5Tokenizer(vocab=letters, merges=[("t", "h")]).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer_file(tmp_path / "tokenizer.json", letters["<|endoftext|>"])
    write_weights(tmp_path / "second", replace(weights, given_tokenizer=tokenizer))
    report = export_checkpoint(tmp_path / "second", tmp_path / "out", target="qwen3_5_moe", verify=verify)
    assert report.class_name == "Qwen3_5MoeForCausalLM" and report.same_argmax is (True if verify else None)
    back = import_huggingface(tmp_path / "out", tmp_path / "back")
    assert back.target == "qwen3_5_moe" and back.model == weights.model


def test_the_card_counts_the_tokens_of_longer_rows_too(data: DataConfig, tmp_path: Path) -> None:
    longer = data.model_copy(update={"phases": (PhaseConfig(start_sample=8, sequence_length=96),)})
    assert train(tiny_config(longer, tmp_path / "run")) == 0
    export_checkpoint(tmp_path / "run", tmp_path / "out", verify=False)
    assert "| Training | 4 steps, 1,152 tokens, float32 |" in (tmp_path / "out" / "README.md").read_text()


def test_sharded_weights_and_index_agree_and_load(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "nemotron_h")
    report = export_checkpoint(folder, tmp_path / "out", verify=False, max_shard_bytes=30_000)
    assert report.max_logit_difference is None
    shards = sorted(name for name in report.files if name.endswith(".safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {name: shard for shard in shards for name in load_file(tmp_path / "out" / shard)}
    assert index["weight_map"] == stored
    sizes = [tensor.numel() * 4 for shard in shards for tensor in load_file(tmp_path / "out" / shard).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    load_with_transformers(tmp_path / "out")


def test_an_export_over_something_is_refused_and_leftovers_of_a_killed_one_are_not(
    data: DataConfig, tmp_path: Path
) -> None:
    folder = weights_folder(data, tmp_path / "weights", "nemotron_h")
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.amfm-export").mkdir()
    (tmp_path / ".out.amfm-export" / "half").write_text("killed here")
    report = export_checkpoint(folder, tmp_path / "out", verify=False)
    assert "half" not in report.files
    with pytest.raises(ValueError, match="exists and is not empty; name another folder"):
        export_checkpoint(folder, tmp_path / "out", verify=False)


def test_a_full_disk_is_named_and_half_an_export_does_not_stay(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "nemotron_h")
    with (
        largest_file(4_000),
        pytest.raises(OSError, match=r"File too large: '.*\.out\.amfm-export/model\.safetensors'"),
    ):
        export_checkpoint(folder, tmp_path / "out", verify=False)
    with largest_file(4_000), pytest.raises(OSError, match=r"File too large: '.*\.out\.amfm-export'"):
        with begin_export(tmp_path / "out") as temporary:
            (temporary / "config.json").write_text(4_001 * " ")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_two_exports_to_one_folder_do_not_meet(tmp_path: Path) -> None:
    with begin_export(tmp_path / "out") as temporary:
        (temporary / "half").touch()
        with pytest.raises(RuntimeError, match=r"another process is writing .*out; wait for it"):
            with begin_export(tmp_path / "out"):
                pass
        assert (temporary / "half").exists()
    with begin_export(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_hold_the_model_is_refused_with_every_reason(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "own")
    with pytest.raises(ValueError, match=r"nemotron_h cannot hold.*activation=swiglu.*positions=rope.*qk_norm=true"):
        export_checkpoint(folder, tmp_path / "out", target="nemotron_h")
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_wrong_source_is_refused(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "nemotron_h")
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"weights\.safetensors has SHA-256"):
        export_checkpoint(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="is not a checkpoint, run directory or imported model"):
        export_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=[] if name in QUICK_TARGETS else [pytest.mark.slow]) for name in MODELS]
)
def test_transformers_generates_what_we_generate(data: DataConfig, tmp_path: Path, target: str) -> None:
    from amfm.pretrain.inference.generate import Sampling, generate_tokens

    folder = weights_folder(data, tmp_path / "weights", target)
    export_checkpoint(folder, tmp_path / "out", verify=False)
    weights = read_weights(folder)
    prompt = weights.tokenizer.encode(sample_text())[:11]
    ours = list(generate_tokens(weights.build(), prompt, 24, Sampling(temperature=0)))
    theirs = load_with_transformers(tmp_path / "out")
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    assert theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() == ours


def test_our_class_generates_alike_with_and_without_state_padding_and_beams(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "own")
    export_checkpoint(folder, tmp_path / "out", verify=False)
    model = load_with_transformers(tmp_path / "out")
    text = read_weights(folder).tokenizer.encode(sample_text())
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    short, long = text[:5], text[5:16]
    alone = [model.generate(torch.tensor([ids]), use_cache=False, **settings)[0, len(ids) :] for ids in (short, long)]
    padded = torch.tensor([[3] * (len(long) - len(short)) + short, long])
    mask = torch.tensor([[0] * (len(long) - len(short)) + [1] * len(short), [1] * len(long)])
    together = model.generate(padded, attention_mask=mask, **settings)[:, len(long) :]
    assert torch.equal(together, torch.stack(alone))
    beams = settings | {"num_beams": 3}
    with_state = model.generate(torch.tensor([long]), **beams)
    assert torch.equal(with_state, model.generate(torch.tensor([long]), use_cache=False, **beams))


def test_our_class_trains_in_transformers_with_the_same_gradients(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "own")
    export_checkpoint(folder, tmp_path / "out", verify=False)
    weights = read_weights(folder)
    ours, theirs = weights.build(), load_with_transformers(tmp_path / "out")
    tokens_BT = torch.tensor(weights.tokenizer.encode(sample_text())[:60]).view(2, 30)
    labels_BT = tokens_BT.roll(-1, 1)
    labels_BT[:, -1] = -100
    loss = ours(tokens_BT, PackMeta.one_document_a_row(2, 30), labels_BT).loss
    (loss.total / 58).backward()
    their_loss = theirs(tokens_BT, labels=tokens_BT).loss
    their_loss.backward()
    torch.testing.assert_close(their_loss, loss.nll_sum / 58, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    of_theirs = weight_map(weights.model, "own").to_ours(gradients | dict(theirs.named_buffers()))
    for name, parameter in ours.named_parameters():
        scale = parameter.grad.abs().max()
        # float32 on both sides, summed in another order.
        assert (of_theirs[name] - parameter.grad).abs().max() <= 2e-5 * scale, name


def test_bf16_and_resaving_keep_our_class_usable(data: DataConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_checkpoint(weights_folder(data, tmp_path / "weights", "own"), tmp_path / "out", verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, trust_remote_code=True)
    assert model.model.layers[2].mixer.router.weight.dtype == torch.float32
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    model.save_pretrained(tmp_path / "again")
    load_with_transformers(tmp_path / "again")


def test_the_working_directory_is_no_place_and_a_link_is_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with begin_export(tmp_path / "link") as temporary:
        (temporary / "file").touch()
        put_in_place(temporary, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "empty").iterdir()] == ["file"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the working directory, which would be replaced; name a folder"):
        check_free(Path("."))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="loop is a link that leads to nothing"):
        check_free(tmp_path / "loop")
