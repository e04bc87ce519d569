"""Every family of the table, made by transformers with other settings than its defaults, is ours: logits, gradients, bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amfm.model.huggingface.classes import (
    BY_TYPE,
    NATIVE_TARGETS,
    TokenIds,
    explain_unfit,
    huggingface_config,
    model_config_from_huggingface,
)
from amfm.model.huggingface.plain.families import FAMILIES
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from tests.model.huggingface.differences import PAGE, find_differences, relative_difference
from tests.model.huggingface.families import CASES, DELTA, REFUSED, SIZES, class_defaults, made_by_transformers
from tests.model.huggingface.test_huggingface import GRADIENT_TOLERANCE, RELATIVE_TOLERANCE

NONE = TokenIds(None, None, None)


def test_the_page_has_a_row_for_every_class() -> None:
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows == [f"`{name}`" for name in sorted(NATIVE_TARGETS)], "python -m tests.model.huggingface.differences"


def test_every_family_has_cases_and_a_refusal() -> None:
    families = {family.name for family in FAMILIES}
    assert {kind for kind, _ in CASES.values()} >= families
    assert {kind for kind, _, _ in REFUSED} >= families


@pytest.mark.parametrize(("kind", "changes"), CASES.values(), ids=CASES.keys())
def test_a_model_of_transformers_is_ours(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs, state = made_by_transformers(kind, changes, tmp_path)
    config = model_config_from_huggingface(theirs.config.to_dict())
    mapping = BY_TYPE[kind].weights(config)
    ours = HybridModel(config, single_rank_groups(), seed=0)
    read = dict(mapping.to_ours(state))
    ours.load_state_dict(read)

    found = find_differences(ours.eval(), theirs, kind)
    assert found.logits < 2 * RELATIVE_TOLERANCE and found.gradients < GRADIENT_TOLERANCE, found

    # Back: the tensors are theirs bitwise, and config.json says the same model to their class.
    again = mapping.to_theirs(read)
    # Under the names of releases, which transformers may have changed.
    state = {mapping.aliases.get(name, name): tensor for name, tensor in state.items()}
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert explain_unfit(config, kind) == []
    fields = huggingface_config(config, kind, NONE, max_position_embeddings=128)
    assert model_config_from_huggingface(class_defaults(fields)) == config


def test_convolutions_that_transformers_cut_evenly_are_read(tmp_path: Path) -> None:
    """Its parts of olmo_hybrid are thirds, not those of queries, keys and values, where these differ in width."""
    changes = {**DELTA, "layer_types": ["linear_attention", "full_attention"], "rope_parameters": None}
    theirs, state = made_by_transformers("olmo_hybrid", changes, tmp_path)
    config = model_config_from_huggingface(theirs.config.to_dict())
    mapping = BY_TYPE["olmo_hybrid"].weights(config)
    assert [len(state[f"model.layers.0.linear_attn.{part}_conv1d.weight"]) for part in "qkv"] == [15, 15, 14]
    ours = HybridModel(config, single_rank_groups(), seed=0)
    ours.load_state_dict(dict(mapping.to_ours(state)))
    tokens_BT = torch.randint(0, SIZES["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(1))
    logits_BTV = ours.eval()(tokens_BT).logits_BTV
    assert relative_difference(logits_BTV, theirs(tokens_BT, use_cache=False).logits) < 2 * RELATIVE_TOLERANCE
    written = mapping.to_theirs(dict(mapping.to_ours(state)))
    assert [len(written[f"model.layers.0.linear_attn.{part}_conv1d.weight"]) for part in "qkv"] == [12, 12, 20]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_what_our_model_has_not_is_refused_by_name_and_value(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config_from_huggingface(class_defaults(SIZES | {"model_type": kind} | changes))
