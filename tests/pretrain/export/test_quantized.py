"""Released weights of 4 and 8 bits: every number by the definition of its format, whole models, and what is rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.rope import yarn_of
from amfm.model.on_demand import on_demand
from amfm.model.packing import PackMeta
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.export.quantized import decode_mxfp4, read_quantized
from amfm.pretrain.inference.weights import read_weights, write_weights
from tests.pretrain.export.exported_models import MODELS, random_weights
from tests.pretrain.export.test_import_huggingface import LATENT_MODELS, edit_json

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150.0,
    "factor": 32.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
    "truncate": False,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 12]}
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 5, 9]])


def one_number(byte: int, scale: int, *, high: bool) -> float:
    """A number of mxfp4 by the words of the standard: sign, then the number, times a power of two."""
    bits = byte >> 4 if high else byte & 15
    return (-1.0 if bits & 8 else 1.0) * NUMBERS[bits & 7] * 2.0 ** (scale - 127)


def to_mxfp4(x_EAB: Tensor) -> tuple[Tensor, Tensor]:
    """Round blocks of 32 numbers to the nearest e2m1 under a power of two that holds the largest: bytes and scales."""
    blocks = x_EAB.unflatten(-1, (-1, 32))
    powers = blocks.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2
    scaled = blocks / 2.0 ** powers[..., None]
    nearest = (scaled.abs()[..., None] - torch.tensor(NUMBERS)).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (powers + 127).to(torch.uint8)


def to_fp8(x_AB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales of blocks, and the numbers that both mean."""
    rows, columns = FP8["weight_block_size"]
    scales = torch.empty(-(-x_AB.shape[0] // rows), -(-x_AB.shape[1] // columns))
    codes, meant = torch.empty_like(x_AB, dtype=torch.float8_e4m3fn), torch.empty_like(x_AB)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = x_AB[part].abs().max() / 448.0
            codes[part] = (x_AB[part] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = codes[part].float() * scales[i, j]
    return codes, scales, meant


def write_released(folder: Path, like: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    """A folder with the config.json and tokenizer of an export, and these tensors."""
    folder.mkdir()
    for file in like.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    fields = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(fields | ({} if quantization is None else {"quantization_config": quantization}))
    )
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_each_byte_and_scale_of_mxfp4_is_the_standards_number() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    blocks = torch.randint(256, (255, 1, 16), generator=generator).to(torch.uint8)
    blocks[127, 0] = torch.arange(0, 256, 16) + torch.arange(16)
    found = decode_mxfp4(blocks, scales)
    for row in range(255):
        expected = [one_number(int(byte), row, high=high) for byte in blocks[row, 0] for high in (False, True)]
        # The largest are beyond float32 and become infinity there, too.
        assert torch.equal(found[row], torch.tensor(expected, dtype=torch.float64).float()), row
    assert decode_mxfp4(blocks[:1], torch.full((1, 1), 255, dtype=torch.uint8)).isnan().all()


def test_a_gpt_oss_of_four_bits_is_read_as_the_class_computes_it(data: DataConfig, tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    model = MODELS["gpt_oss"] | {"moe": MODELS["gpt_oss"]["moe"] | {"expert_hidden_size": 64}}
    (tmp_path / "weights").mkdir()
    write_weights(tmp_path / "weights", random_weights(data, model))
    like = export_checkpoint(tmp_path / "weights", tmp_path / "out", verify=False).path
    # Positions are those of the release: stretched in windows and attention, by a ramp that is not rounded.
    edit_json(like / "config.json", rope_parameters=YARN, rope_scaling=YARN)
    theirs, generator = GptOssForCausalLM(GptOssConfig.from_pretrained(like)).eval(), torch.Generator().manual_seed(1)
    assert theirs.model.rotary_emb.attention_scaling > 1.1
    released: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + name.endswith("norm.weight"))
            if not name.endswith(("gate_up_proj", "down_proj")):
                released[name] = parameter.detach().clone()
                continue
            blocks, scales = to_mxfp4(parameter.transpose(1, 2))
            released[f"{name}_blocks"], released[f"{name}_scales"] = blocks, scales
            meant = [
                [one_number(int(byte), int(scale), high=high) for byte in block for high in (False, True)]
                for block, scale in zip(blocks.reshape(-1, 16), scales.flatten(), strict=True)
            ]
            parameter.copy_(torch.tensor(meant).view(parameter.transpose(1, 2).shape).transpose(1, 2))
        expected = theirs(TOKENS).logits
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    import_huggingface(write_released(tmp_path / "released", like, released, method), tmp_path / "back")
    weights = read_weights(tmp_path / "back")
    assert weights.model.mixers.window.yarn == yarn_of(weights.model.attention.rope) is not None
    with torch.no_grad():
        ours = weights.build()(TOKENS, PackMeta.one_document_a_row(1, TOKENS.shape[1])).logits_BTV
    # Two float32 implementations, logits of order 10.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    export_checkpoint(tmp_path / "back", tmp_path / "again", verify=False)
    again, state = load_file(tmp_path / "again" / "model.safetensors"), theirs.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in again)

    name = next(name for name in released if name.endswith("down_proj_scales"))
    released[name] = released[name].clone().fill_(255)
    broken = write_released(tmp_path / "broken", like, released, method)
    with pytest.raises(ValueError, match=r"experts\.down_proj holds NaN or infinity"):
        import_huggingface(broken, tmp_path / "none")


@pytest.mark.parametrize("target", ["deepseek_v3", "deepseek_v32"])
def test_a_deepseek_of_eight_bits_is_what_its_numbers_and_scales_mean(
    data: DataConfig, tmp_path: Path, target: str
) -> None:
    (tmp_path / "weights").mkdir()
    yarn = {"factor": 40.0, "original_length": 16, "mscale": 1.0}
    mixers = {"mla": LATENT_MODELS[target]["mixers"]["mla"] | {"yarn": yarn}}
    write_weights(tmp_path / "weights", random_weights(data, LATENT_MODELS[target] | {"mixers": mixers}))
    like = export_checkpoint(tmp_path / "weights", tmp_path / "out", verify=False).path
    released: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(like / "model.safetensors").items():
        released[name] = meant[name] = tensor
        if name.endswith("proj.weight"):
            released[name], released[f"{name}_scale_inv"], meant[name] = to_fp8(tensor)
    assert sum(name.endswith("_scale_inv") for name in released) > 10
    import_huggingface(write_released(tmp_path / "released", like, released, FP8), tmp_path / "back")
    import_huggingface(write_released(tmp_path / "meant", like, meant, None), tmp_path / "same")
    back, same = (read_weights(tmp_path / name) for name in ("back", "same"))
    assert back.model == same.model and back.model.mixers.mla.yarn.mscale == 1.0
    assert all(torch.equal(back.state[name], same.state[name]) for name in same.state)


def test_rows_of_both_formats_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(2)
    codes, scales, meant = to_fp8(torch.randn(41, 29, generator=generator))
    found = read_quantized(on_demand({"a.weight": codes, "a.weight_scale_inv": scales}), FP8, Path("here"))
    assert torch.equal(found["a.weight"], meant)
    assert torch.equal(found.rows("a.weight", (15, 33)), meant[15:33])
    blocks, powers = to_mxfp4(torch.randn(5, 6, 64, generator=generator))
    found = read_quantized(on_demand({"a_blocks": blocks, "a_scales": powers}), {"quant_method": "mxfp4"}, Path("here"))
    assert found.shape("a") == (5, 64, 6) == tuple(found["a"].shape)
    assert torch.equal(found.rows("a", (1, 4)), found["a"][1:4])


def test_what_does_not_belong_together_is_refused_by_name() -> None:
    fp8, bytes_ = torch.ones(20, 20).to(torch.float8_e4m3fn), torch.ones(2, 3, 4, 16, dtype=torch.uint8)
    mxfp4 = {"quant_method": "mxfp4"}
    for quantization, tensors, said in (
        ("awq", {}, r"here/config\.json: weights quantized by awq are not read, only by mxfp4 and fp8; use"),
        ({"bits": 4}, {}, "quantized by an unnamed method are not read"),
        ({"quant_method": "fp8"}, {}, "weight_block_size=None, and must be two integers"),
        (FP8, {"a_scale_inv": torch.ones(2, 2)}, "a_scale_inv is there and a is not; copy the whole folder"),
        (
            FP8,
            {"a": fp8, "a_scale_inv": torch.ones(2, 1)},
            r"a is float8_e4m3fn \[20, 20\] and a_scale_inv float32 \[2, 1\]",
        ),
        (FP8, {"a": fp8.float(), "a_scale_inv": torch.ones(2, 2)}, r"a is float32 \[20, 20\]"),
        (mxfp4, {"a_scales": bytes_[..., 0]}, "a_scales is there and a_blocks is not"),
        (mxfp4, {"a_blocks": bytes_, "a_scales": bytes_[:, :2, :, 0]}, r"a_scales uint8 \[2, 2, 4\], and must be"),
        (mxfp4, {"a_blocks": bytes_, "a_scales": bytes_[..., 0].float()}, r"a_scales float32 \[2, 3, 4\]"),
    ):
        with pytest.raises(ValueError, match=said):
            read_quantized(on_demand(tensors), quantization, Path("here"))
    plain = on_demand({"a": fp8})
    assert read_quantized(plain, None, Path("here")) is plain
