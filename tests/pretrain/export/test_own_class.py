"""Our own modelling file rejects what it cannot do by name: files of another version, backends, caches, shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface import own
from amfm.model.huggingface.classes import TokenIds, huggingface_config, weight_map
from amfm.pretrain.export.export import export_checkpoint
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.export.modeling_template import configuration_amfm, mixers_amfm
from amfm.pretrain.export.modeling_template.configuration_amfm import AmfmConfig
from amfm.pretrain.export.modeling_template.modeling_amfm import AmfmForCausalLM
from amfm.pretrain.export.vllm_plugin.vllm_amfm import served
from amfm.pretrain.inference.weights import read_weights, write_weights
from tests.model.mixers.samples import sample_options
from tests.pretrain.export.exported_models import MODELS, random_weights
from tests.pretrain.tiny_run import MODEL

IDS = torch.arange(10, 22)[None]


def build(pattern: str, attention: str = "sdpa") -> AmfmForCausalLM:
    mixers = {name: sample_options(name) for name in ("window", "mla", "deltanet")}
    config = ModelConfig.model_validate(MODEL | {"pattern": pattern, "mixers": mixers})
    fields = huggingface_config(config, "own", TokenIds(None, None, None), max_position_embeddings=64)
    torch.manual_seed(0)
    return AmfmForCausalLM._from_config(AmfmConfig(**fields), attn_implementation=attention).eval()


def test_the_files_and_the_export_agree_on_their_version() -> None:
    assert configuration_amfm.MODELING_VERSION == served.VERSION == own.MODELING_VERSION
    assert served.LETTERS.items() >= mixers_amfm.LETTERS.items()


def test_an_export_of_the_first_version_is_imported_and_refused_by_newer_files(
    data: DataConfig, tmp_path: Path
) -> None:
    weights = random_weights(data, MODELS["own"])
    (tmp_path / "weights").mkdir()
    write_weights(tmp_path / "weights", weights)
    out = export_checkpoint(tmp_path / "weights", tmp_path / "out", verify=False).path
    # As the first version wrote it: our names, no number.
    names = {theirs: ours for ours, theirs in weight_map(weights.model, "own").aliases.items()}
    tensors = load_file(out / "model.safetensors")
    save_file({names[name]: tensor for name, tensor in tensors.items()}, out / "model.safetensors")
    fields: dict[str, Any] = json.loads((out / "config.json").read_text())
    del fields["modeling_version"]
    (out / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"version 1 of amfm's modeling files.*`amfm import` the folder"):
        AmfmConfig.from_pretrained(out)
    import_huggingface(out, tmp_path / "back")
    back = read_weights(tmp_path / "back")
    assert back.model == weights.model
    assert all(torch.equal(back.state[name], value) for name, value in weights.state.items())


@pytest.mark.parametrize(("pattern", "block"), [("M+", r"\+"), ("*W", "W")])
def test_flash_attention_is_refused_where_a_block_could_not_use_it(pattern: str, block: str) -> None:
    with pytest.raises(ValueError, match=f"does not serve the block {block} of the pattern; use attn_implementation"):
        build(pattern, "flash_attention_2")


def test_flex_attention_which_was_not_shown_to_work_is_refused() -> None:
    with pytest.raises(ValueError, match="does not support"):
        build("*-", "flex_attention")


def test_backends_get_heads_as_they_are_and_a_mask_where_rows_are_padded() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen: list[tuple[tuple[int, ...], ...]] = []

    def note(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        seen.append((query.shape, key.shape, value.shape, () if mask is None else mask.shape))
        return sdpa_attention_forward(module, query, key, value, mask, **settings)

    AttentionInterface.register("noted", note)
    AttentionMaskInterface.register("noted", sdpa_mask)
    model = build("*-", "noted")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    model(IDS)
    model(IDS, attention_mask=mask)
    heads = ((1, 4, 12, 8), (1, 2, 12, 8), (1, 2, 12, 8))
    assert seen == [(*heads, ()), (*heads, (1, 1, 12, 12))]


def test_what_would_give_wrong_numbers_is_refused() -> None:
    from transformers import DynamicCache

    model = build("M{deltanet}")
    documents = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    cache = model(IDS, use_cache=True).cache
    for arguments, kind, words in (
        ({"cache": DynamicCache()}, TypeError, "cache=DynamicCache: the blocks keep states in an AmfmCache"),
        ({"attention_mask": torch.ones(1, 5)}, ValueError, r"attention_mask is \(1, 5\), and must be \(1, 12\)"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, ValueError, "attention_mask is"),
        ({"position_ids": documents, "use_cache": True}, ValueError, "several documents in a sequence"),
        ({"position_ids": documents, "cache": cache}, ValueError, "begins behind tokens of the cache"),
        ({"seq_idx": documents[:, :4]}, ValueError, r"seq_idx is \(1, 4\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, ValueError, "must rise from 0 to 12"),
        ({"is_causal": False}, ValueError, "states are read from left to right"),
        ({"output_router_logits": True}, ValueError, "blocks return no router logits"),
        ({"labels": IDS, "logits_to_keep": 2}, ValueError, "logits_to_keep=2 with labels"),
        ({"state": cache}, TypeError, "state is not an argument of an amfm model"),
    ):
        with pytest.raises(kind, match=words):
            model(IDS, **arguments)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(IDS, max_new_tokens=1, cache_implementation="static")
    with pytest.raises(ValueError, match="a recurrent state holds no earlier token"):
        cache.crop(1)
