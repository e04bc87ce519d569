"""Models of packages of examples/ on the plays of tests/helpers/text/plays.py: a program, as packages are found by a new process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from amfm.data_pipeline.prepare.sample_text import fetch_corpus
from tests.helpers.examples import ROOT, run_module

# Two blocks of each half, as wide as in test_attention_free.py.
WIDE = {
    "vocab_size": 256,
    "hidden_size": 96,
    "attention": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "positions": "rope"},
}
# What others are compared with, after as many steps: about as many weights, 0.33M and 0.29M.
UNITS = {"activation": "swiglu"}
OTHERS: dict[str, dict[str, Any]] = {
    "attention": {"pattern": "(*-)x2", "feed_forward": UNITS | {"hidden_size": 352}},
    "without tokens before": {"pattern": "(-)x4", "feed_forward": UNITS | {"hidden_size": 208}},
}


def losses_on_plays(
    packages: list[Path], folder: Path, seed: int, steps: int, forms: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Train a model of each form for so many steps: its weights, held-out nats per byte (`loss`), and means of its
    auxiliary values over the last tenth of the steps. Without a network the test is skipped."""
    try:
        fetch_corpus("shakespeare", folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    done = run_module(
        "tests.helpers.text.losses", folder, str(seed), str(steps), json.dumps(forms), packages=[*packages, ROOT]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    shown = (f"{name} " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()) for name, row in found.items())
    print(f"\nseed {seed}, {steps} steps: " + "; ".join(shown))
    return found


def main(folder: str, seed: str, steps: str, forms: str) -> int:
    """Do what `losses_on_plays` asks for, and print a line of JSON."""
    from amfm.model.config.schema import ModelConfig
    from amfm.model.hybrid import HybridModel
    from amfm.model.parallel.groups import single_rank_groups
    from tests.helpers.text.plays import held_out_loss, mean_loss, train

    found = {}
    for name, section in json.loads(forms).items():
        model = HybridModel(ModelConfig.model_validate(WIDE | section), single_rank_groups(), seed=int(seed))
        seen: list[dict[str, float]] = []

        def loss(output: Any, seen: list[dict[str, float]] = seen) -> Any:
            seen.append({key: float(value) for key, value in output.auxiliary.items()})
            return mean_loss(output) + sum(value for value in output.auxiliary.values() if value.requires_grad)

        train(model, Path(folder), int(steps), peak=4e-3, seed=int(seed), loss=loss)
        late = seen[-(int(steps) // 10) :]
        found[name] = {
            "weights": float(sum(parameter.numel() for parameter in model.parameters())),
            "loss": held_out_loss(model, Path(folder)),
            **{key: sum(each[key] for each in late) / len(late) for key in late[0]},
        }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
