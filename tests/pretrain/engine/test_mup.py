"""muP as it trains: activations change alike at every width, and the groups' rates and epsilons follow the classes.

The coordinate check of Yang et al. 2022 (arXiv 2203.03466, section 4 and appendix D.1): after a few steps of AdamW the mean
change of the stream and of the logits must not depend on the width. Its verdict decides which kinds of block may be used
with `model.mup` (docs/mup.md has the table).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from amfm_foreign_states.universal import export_universal
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.kinds import BUILT_IN
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.schema import OptimizerConfig
from amfm.pretrain.engine.engine import build_engine
from amfm.pretrain.engine.optimizer import build_optimizer
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import Trained, tiny_config, tiny_data, train_and_collect

CHECKED_LETTERS = [kind.symbol for kind in BUILT_IN if kind.has_mup]
BASE, VOCABULARY, ROWS, TOKENS = 64, 64, 8, 64


def model_of_width(pattern: str, width: int, *, mup: bool, seed: int, tied: bool = False) -> HybridModel:
    """Heads of 16 channels, groups and inner widths grow with the width; states and experts do not."""
    heads = width // 16
    delta = {"num_heads": heads, "head_dim": 16}
    config = {
        "pattern": pattern,
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "tie_embeddings": tied,
        "initializer_range": 0.05,
        "mamba": {"num_heads": 2 * heads, "head_dim": 16, "state_size": 16, "num_groups": width // BASE},
        "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": 16},
        "moe": {
            "num_experts": 4,
            "top_k": 2,
            "expert_hidden_size": width,
            "shared_expert_hidden_size": width,
            "auxiliary_loss_weight": 0.01,
        },
        "feed_forward": {"hidden_size": 4 * width},
        "mixers": {"gated_deltanet": delta, "kda": delta},
        "mup": {"base_hidden_size": BASE} if mup else None,
    }
    return HybridModel(ModelConfig.model_validate(config), single_rank_groups(), seed=seed)


def markov_batches(seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Tokens and labels [ROWS, TOKENS] of a Markov chain: something to learn without a file."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator), -1)

    def draw() -> tuple[Tensor, Tensor]:
        columns = [torch.randint(0, VOCABULARY, (ROWS,), generator=generator)]
        for _ in range(TOKENS):
            columns.append(torch.multinomial(table[columns[-1]], 1, generator=generator)[:, 0])
        tokens = torch.stack(columns, 1)
        return tokens[:, :-1], tokens[:, 1:]

    return draw


META = PackMeta.one_document_a_row(ROWS, TOKENS)


def train(model: HybridModel, rate: float, steps: int, draw: Callable[[], tuple[Tensor, Tensor]]) -> float:
    """Train and return the mean loss of the last ten steps."""
    adamw = build_optimizer(model, OptimizerConfig(learning_rate=rate))
    for group in adamw.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)
    losses = []
    for _ in range(steps):
        tokens, labels = draw()
        output = model(tokens, META, labels)
        assert output.loss is not None
        loss = output.loss.total / labels.numel()
        adamw.zero_grad()
        torch.stack([loss, *output.auxiliary.values()]).sum().backward()
        adamw.step()
        losses.append(float(output.loss.nll_sum) / labels.numel())
    return sum(losses[-10:]) / len(losses[-10:])


def observe(model: HybridModel, tokens: Tensor, training: Callable[[], object]) -> tuple[float, float]:
    """Mean absolute change, by some training, of the last stream and of the logits on these tokens."""

    @torch.no_grad()
    def activations() -> tuple[Tensor, Tensor]:
        model.eval()
        stream = model.pass_blocks(model.embed(tokens), model.blocks.indices(), META)
        logits = model(tokens, META).logits_BTV
        model.train()
        assert stream.delta_BTD is not None
        return stream.residual_BTD + stream.delta_BTD, logits

    before = activations()
    training()
    stream, logits = ((new - old).abs().mean().item() for new, old in zip(activations(), before, strict=True))
    return stream, logits


def changes(pattern: str, width: int, *, mup: bool = True, seed: int = 0, tied: bool = False) -> tuple[float, float]:
    """Changes by six steps of AdamW at rate 0.01."""
    model, draw = model_of_width(pattern, width, mup=mup, seed=seed, tied=tied), markov_batches(seed)
    tokens, _ = draw()
    return observe(model, tokens, lambda: train(model, 0.01, 6, draw))


def spread(pattern: str, widths: tuple[int, ...], **options: bool | int) -> tuple[float, float]:
    """Largest by smallest change over the widths, of the stream and of the logits."""
    rows = [changes(pattern, width, **options) for width in widths]  # type: ignore[arg-type]
    print(pattern, options, [f"{stream:.3g}/{logits:.3g}" for stream, logits in rows])
    return spread_of(rows)


def spread_of(rows: list[tuple[float, float]]) -> tuple[float, float]:
    stream, logits = (max(values) / min(values) for values in zip(*rows, strict=True))
    return stream, logits


def changes_by_muon(patterns: list[str], widths: tuple[int, ...], mup: bool) -> dict[str, list[tuple[float, float]]]:
    """Changes by six steps of Muon at rate 0.01, of each pattern at each width; runs on a rank, for Muon needs an engine."""
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    optimizer = OptimizerConfig(learning_rate=0.01, kind="muon")

    def change(pattern: str, width: int) -> tuple[float, float]:
        model, draw = model_of_width(pattern, width, mup=mup, seed=0), markov_batches(0)
        tokens, _ = draw()
        engine = build_engine(model, optimizer=optimizer, precision="float32", zero_stage=0, parallel=parallel)

        def steps() -> None:
            for _ in range(6):
                x, y = draw()
                with engine.accumulate(1):
                    output = engine.forward(x, META, y)
                    shares = [output.loss.total / y.numel(), *output.auxiliary.values()]
                    engine.backward(torch.stack(shares).sum())
                engine.step(0.01)

        return observe(model, tokens, steps)

    return {pattern: [change(pattern, width) for width in widths] for pattern in patterns}


def test_activations_change_alike_at_two_widths_and_not_without_mup() -> None:
    assert max(spread("*-", (64, 256))) < 2
    assert spread("*-", (64, 256), mup=False)[0] > 10


def test_a_tied_head_changes_logits_alike_at_two_widths() -> None:
    assert max(spread("*-", (64, 256), tied=True)) < 2


def test_muon_changes_activations_alike_at_two_widths() -> None:
    (found,) = run_ranks(changes_by_muon, ["*-"], (64, 256), True, num_ranks=1)
    assert max(spread_of(found["*-"])) < 2


def test_groups_carry_rate_and_epsilon_of_their_class() -> None:
    model = model_of_width("*E", 128, mup=True, seed=0)
    adamw = build_optimizer(model, OptimizerConfig(learning_rate=1e-3, epsilon=1e-6))
    groups = {group["label"]: group for group in adamw.param_groups}
    assert {label: (group.get("rate_scale"), group["eps"]) for label, group in groups.items()} == {
        "decay": (None, 1e-6),
        "decay_wide": (0.5, 5e-7),
        "decay_out": (0.5, 1e-6),
        "no_decay": (None, 1e-6),
    }
    assert groups["decay"]["parameter_names"] == ["embedding.weight"]
    assert set(groups["decay_out"]["parameter_names"]) == {"blocks.1.mixer.router.weight", "head.weight"}
    assert all(groups[label]["weight_decay"] > 0 for label in ("decay", "decay_wide", "decay_out"))
    plain = build_optimizer(model_of_width("*E", 128, mup=False, seed=0), OptimizerConfig(learning_rate=1e-3))
    assert [group["label"] for group in plain.param_groups] == ["decay", "no_decay"]


def pattern_of(letter: str) -> str:
    return {"-": "----", "E": "*E*E"}.get(letter, f"{letter}-{letter}-")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("letter", CHECKED_LETTERS)
def test_every_kind_of_block_that_mup_takes_changes_alike_at_four_widths(letter: str, seed: int) -> None:
    assert max(spread(pattern_of(letter), (64, 128, 256, 512), seed=seed)) < 2


@pytest.mark.slow
def test_every_kind_of_block_changes_alike_at_four_widths_under_muon_and_not_without_mup() -> None:
    patterns = [pattern_of(letter) for letter in CHECKED_LETTERS]
    (found,) = run_ranks(changes_by_muon, patterns, (64, 128, 256, 512), True, num_ranks=1)
    print(found)
    assert all(max(spread_of(rows)) < 2 for rows in found.values())
    (found,) = run_ranks(changes_by_muon, ["*-*-"], (64, 512), False, num_ranks=1)
    assert spread_of(found["*-*-"])[0] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_rate_at_width_64_is_the_best_at_256(seed: int) -> None:
    rates = [2.0**exponent for exponent in (-9, -7, -6, -5)]

    def best(width: int, *, mup: bool) -> int:
        models = [model_of_width("*-*-", width, mup=mup, seed=seed) for _ in rates]
        losses = [train(model, rate, 100, markov_batches(7)) for model, rate in zip(models, rates, strict=True)]
        print(width, mup, [f"{loss:.3f}" for loss in losses])
        return losses.index(min(losses))

    assert best(64, mup=True) == best(256, mup=True)
    assert best(64, mup=False) > best(256, mup=False)


def train_tiny(data: DataConfig, folder: str, stop: int | None, tensor: int) -> Trained:
    return train_and_collect(
        tiny_config(
            data,
            Path(folder),
            train__steps=4,
            train__stop_after_steps=stop,
            parallel__zero_stage=1,
            parallel__tensor=tensor,
            model__mup={"base_hidden_size": 8},
        )
    )


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_two_tensor_ranks_train_as_one(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    straight = run_ranks(train_tiny, data, str(tmp_path / "straight"), None, 1, num_ranks=1)[0]
    for stop in (2, None):
        resumed = run_ranks(train_tiny, data, str(tmp_path / "resumed"), stop, 1, num_ranks=1)[0]
    assert resumed.series("loss") == straight.series("loss")
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in straight.weights.items())
    with pytest.raises(ValueError, match="model\\.mup is set, and DeepSpeed has one learning rate"):
        export_universal(tmp_path / "resumed", tmp_path / "universal")
    cut = run_ranks(train_tiny, data, str(tmp_path / "cut"), None, 2, num_ranks=2)[0]
    assert cut.series("loss") == pytest.approx(straight.series("loss"), rel=1e-5)
