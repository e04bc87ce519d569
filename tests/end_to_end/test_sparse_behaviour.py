"""Recall with a tenth of the keys: an indexer that learned from dense attention finds what attention has to read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from amfm.model.config.core_options import AttentionConfig, Mamba2Config
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.run import set_indexer_stage

# As configs/probes/mqar.yaml: 16 pairs, then 16 questions; 32 keys and 32 values.
PAIRS, KEYS, VALUES, ROWS = 16, 32, 32, 64
LENGTH = 3 * PAIRS
TENTH = 5
INDEXER = {"top_k": TENTH, "num_heads": 4, "head_dim": 32, "stage": "warm_up"}
MODEL = ModelConfig(
    pattern="M*",
    vocab_size=KEYS + VALUES,
    hidden_size=64,
    initializer_range=0.125,
    attention=AttentionConfig.model_validate(
        {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "positions": "rope", "indexer": INDEXER}
    ),
    mamba=Mamba2Config(num_heads=4, head_dim=16, state_size=2, num_groups=1, chunk_size=32),
)


def make_rows(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of keys with their values, then the keys in another order; labels are the values of the keys asked for."""
    keys = torch.rand(ROWS, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (ROWS, PAIRS), generator=generator)
    order = torch.rand(ROWS, PAIRS, generator=generator).argsort(1)
    tokens = torch.cat([torch.stack([keys, values], dim=2).flatten(1), keys.gather(1, order)], dim=1)
    labels = torch.full_like(tokens, -100)
    labels[:, 2 * PAIRS :] = values.gather(1, order)
    return tokens, labels


def train(model: HybridModel, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    meta = PackMeta.one_document_a_row(ROWS, LENGTH)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        tokens, labels = make_rows(generator)
        output = model(tokens, meta, labels)
        optimizer.zero_grad()
        (output.loss.total / (ROWS * PAIRS) + sum(output.auxiliary.values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model: HybridModel) -> float:
    """Share of right answers on rows that no training saw."""
    tokens, labels = make_rows(torch.Generator().manual_seed(1234))
    found = model.eval()(tokens, PackMeta.one_document_a_row(ROWS, LENGTH)).logits_BTV.argmax(-1)
    asked = labels >= 0
    return float((found == labels)[asked].float().mean())


def recall(seed: int) -> dict[str, float]:
    """Accuracy of dense attention, of chosen keys right after the warm-up and after more steps, and of an indexer that learned nothing."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = HybridModel(MODEL, single_rank_groups(), seed=seed)
    untrained = {name: value.clone() for name, value in model.state_dict().items() if ".indexer." in name}
    train(model, 250, generator)
    found = {"dense": accuracy(model)}
    set_indexer_stage(model, "sparse")
    found["chosen"] = accuracy(model)
    by_chance = copy.deepcopy(model)
    by_chance.load_state_dict(untrained, strict=False)
    found["untrained indexer"] = accuracy(by_chance)
    train(model, 60, generator)
    return found | {"trained on chosen": accuracy(model)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_tenth_of_the_keys_suffices_after_a_warm_up(seed: int) -> None:
    found = recall(seed)
    assert min(found["dense"], found["chosen"], found["trained on chosen"]) > 0.97, found
    assert found["untrained indexer"] < 0.5, found
