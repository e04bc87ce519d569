"""`python recall.py CODES SEED`: how often LongVQ finds values that it was shown long before its window of 4 tokens.

A row has four of eight keys, each followed by its value, eight tokens of noise, and the four keys again in another order.
Prints the share of right answers on rows that no training saw; guessing among a row's values is right a quarter of the time.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups

KEYS, PAIRS, GAP, ROWS, STEPS, RATE = 8, 4, 8, 64, 400, 1e-2


def make_rows(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, T], -1 if nothing is asked."""
    keys = torch.rand(ROWS, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(KEYS, 2 * KEYS, (ROWS, PAIRS), generator=generator)
    order = torch.rand(ROWS, PAIRS, generator=generator).argsort(1)
    shown, noise = torch.stack([keys, values], -1).flatten(1), torch.full((ROWS, GAP), 2 * KEYS)
    tokens = torch.cat([shown, noise, keys.gather(1, order)], 1)
    labels = torch.full_like(tokens, -1)
    labels[:, -PAIRS:] = values.gather(1, order)
    return tokens, labels


def recall(num_codes: int, seed: int) -> float:
    """Train two blocks for 400 steps of Adam, and measure."""
    options = {"num_heads": 2, "head_dim": 16, "value_head_dim": 32, "window": 4, "num_codes": num_codes}
    sizes = {"pattern": "{longvq}{longvq}", "vocab_size": 2 * KEYS + 1, "hidden_size": 32, "initializer_range": 0.18}
    config = ModelConfig.model_validate(sizes | {"mixers": {"longvq": options | {"chunk_size": 16}}})
    model, generator = HybridModel(config, single_rank_groups(), seed=seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / 50, max(0.05, (STEPS - step) / (0.3 * STEPS)))
        tokens, labels = make_rows(generator)
        output = model(tokens, PackMeta.one_document_a_row(*tokens.shape))
        loss = cross_entropy(output.logits_BTV.flatten(0, 1), labels.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        (loss + sum(value for value in output.auxiliary.values() if value.requires_grad)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    tokens, labels = make_rows(torch.Generator().manual_seed(99))
    with torch.no_grad():
        found = model.eval()(tokens, PackMeta.one_document_a_row(*tokens.shape)).logits_BTV.argmax(-1)
    return float((found == labels)[labels >= 0].float().mean())


if __name__ == "__main__":
    print(recall(int(sys.argv[1]), int(sys.argv[2])))
