"""Runs on a synthetic task: they learn, continue with bitwise identical results, and measure the same accuracy on any ranks and outside of
the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from amfm_synthetic.evaluate import evaluate_synthetic

from amfm.data_pipeline.config import DataConfig, SyntheticConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.hooks.validate import Validation
from amfm.pretrain.inference.weights import load_initial_weights, read_weights
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.run import Run
from amfm.pretrain.scores import count_correct, measure_accuracy
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.train import train
from tests.helpers.spawn import run_ranks
from tests.pretrain.export.exported_models import weights_folder
from tests.pretrain.tiny_run import held_out, read_events, read_metrics, tiny_config, train_and_collect, validate_now

COPYING = SyntheticConfig(task="selective_copying", num_copied=2, num_symbols=4)
MODEL: dict[str, Any] = {
    "pattern": "M*",
    "vocab_size": 16,
    "hidden_size": 32,
    "mamba": {"num_heads": 4, "head_dim": 16, "state_size": 16, "num_groups": 2, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "positions": "rope"},
}


def synthetic_config(folder: Path, task: SyntheticConfig = COPYING, **settings: Any) -> RunConfig:
    config = tiny_config(
        DataConfig(synthetic=task, num_workers=0), folder, **({"train__sequence_length": 10} | settings)
    )
    return RunConfig.model_validate(config.model_dump(mode="json") | {"model": MODEL})


def predict(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely tokens and labels of all validation batches, from logits."""
    loader = held_out(run)
    loader.seek(0)
    predictions, labels = [], []
    for batch in loader.take(run.config.train.validation_batches * run.config.train.global_batch_size):
        rows, tokens = batch.tokens_BT.shape
        with torch.no_grad():
            logits_BTV = run.model(batch.tokens_BT, PackMeta.one_document_a_row(rows, tokens)).logits_BTV
        predictions.append(logits_BTV.argmax(-1))
        labels.append(batch.labels_BT)
    return torch.cat(predictions), torch.cat(labels)


@pytest.mark.parametrize("steps", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_small_hybrid_learns_to_copy_past_noise(tmp_path: Path, steps: int) -> None:
    """Three steps are for what is written and measured again."""
    settings = {"steps": steps, "micro_batch_size": 32, "global_batch_size": 32, "validation_batches": 2}
    config = synthetic_config(
        tmp_path, optimizer__learning_rate=1e-2, **{f"train__{name}": value for name, value in settings.items()}
    )
    assert train(config) == 0
    line, (event,) = read_metrics(tmp_path)[-1], read_events(tmp_path, "validation")
    # Guessing is right for a quarter of the tokens and a sixteenth of the rows; another seed of weights may be slower.
    assert steps == 3 or (line["validation_accuracy"] > 0.85 and line["validation_row_accuracy"] > 0.7)
    assert event["accuracy"] == {
        "answers": line["validation_accuracy"],
        "rows": line["validation_row_accuracy"],
        "num_answers": 128,
        "num_rows": 64,
    }
    assert line["data"] == {
        "phase": 0,
        "tokens": {"selective_copying": steps * 32 * 10},
        "epochs": {"selective_copying": 0.0},
    }
    evaluation = evaluate_synthetic(tmp_path, "selective_copying", num_rows=64, rows_at_once=7)
    assert evaluation.accuracy.token_accuracy == line["validation_accuracy"], "the same rows, from the checkpoint"
    assert evaluation.accuracy.row_accuracy == line["validation_row_accuracy"]
    assert evaluation.loss == pytest.approx(line["validation_loss"], rel=1e-5)
    assert (evaluation.chance, evaluation.settings) == (0.25, {"num_copied": 2, "num_symbols": 4})
    longer = evaluate_synthetic(
        tmp_path, "selective_copying", num_rows=32, sequence_length=29, overrides=["num_copied=3"]
    )
    assert (longer.sequence_length, longer.accuracy.num_labels) == (29, 96)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    straight = train_and_collect(synthetic_config(tmp_path / "straight", train__validate_every_steps=2))
    assert train(synthetic_config(tmp_path / "halves", train__validate_every_steps=2, train__stop_after_steps=3)) == 0
    resumed = train_and_collect(synthetic_config(tmp_path / "halves", train__validate_every_steps=2))
    for key in ("loss", "grad_norm", "tokens", "data"):
        assert resumed.series(key) == straight.series(key), key
    assert resumed.metrics[-1]["validation_accuracy"] == straight.metrics[-1]["validation_accuracy"]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in straight.weights.items())
    with pytest.raises(ValueError, match=r"data\.synthetic\.num_symbols: the checkpoint has 4, this run has 5"):
        train(synthetic_config(tmp_path / "halves", COPYING.model_copy(update={"num_symbols": 5})))


def test_accuracy_counts_tokens_and_whole_rows() -> None:
    labels_BT = torch.tensor([[-100, 1, 2], [3, -100, -100], [0, 1, 2]])
    predictions_BT = torch.tensor([[7, 1, 2], [0, 0, 0], [0, 1, 1]])
    counts_B2 = count_correct(predictions_BT, labels_BT)
    assert counts_B2.tolist() == [[2, 2], [1, 0], [3, 2]]
    accuracy = measure_accuracy(counts_B2)
    assert (accuracy.token_accuracy, accuracy.row_accuracy) == (pytest.approx(4 / 6), pytest.approx(1 / 3))
    halves = count_correct(predictions_BT[:, :2], labels_BT[:, :2]) + count_correct(
        predictions_BT[:, 2:], labels_BT[:, 2:]
    )
    assert torch.equal(halves, counts_B2), "ranks that share the tokens of a row add their parts"


def test_predictions_beside_the_loss_are_those_of_the_logits() -> None:
    config = synthetic_config(Path("unused")).model
    model = HybridModel(config, single_rank_groups(), seed=3).eval()
    tokens_BT = torch.randint(16, (3, 11), generator=torch.Generator().manual_seed(0))
    meta = PackMeta.one_document_a_row(3, 11)
    with torch.no_grad():
        logits_BTV = model(tokens_BT, meta).logits_BTV
        output, plain = model(tokens_BT, meta, tokens_BT, predicts=True), model(tokens_BT, meta, tokens_BT)
    assert torch.equal(output.predictions_BT, logits_BTV.argmax(-1)) and plain.predictions_BT is None
    assert torch.equal(output.loss.nll_sum, plain.loss.nll_sum)


QUICK: list[dict[str, Any]] = [{"context": 2}, {"pipeline": 2}]
MORE: list[dict[str, Any]] = [{"zero_stage": 3}, {"tensor": 2}]


def parity_config(folder: Path, parallel: dict[str, Any]) -> RunConfig:
    """An untrained model of two tokens, which is right about half of the time."""
    settings = {f"parallel__{name}": value for name, value in parallel.items()}
    config = synthetic_config(
        folder, SyntheticConfig(task="parity"), train__sequence_length=12, train__validation_batches=3, **settings
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 2})})


def validate_layouts(folder: str, layouts: list[dict[str, Any]]) -> list[Validation]:
    found = []
    for number, parallel in enumerate(layouts):
        with SignalWatch() as signals:
            run = start_run(parity_config(Path(folder, str(number)), parallel), signals)
            found.append(validate_now(run))
            close_run(run)
    return found


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(MORE, marks=pytest.mark.slow)])
def test_every_layout_of_ranks_has_the_accuracy_of_one_rank(tmp_path: Path, layouts: list[dict[str, Any]]) -> None:
    with SignalWatch() as signals:
        run = start_run(parity_config(tmp_path / "one", {}), signals)
        expected = validate_now(run)
        predictions_BT, labels_BT = predict(run)
        close_run(run)
    assert expected.accuracy is not None and expected.accuracy.num_rows == 12
    assert expected.accuracy.token_accuracy == int((predictions_BT == labels_BT).sum()) / labels_BT.numel()
    assert 0.2 < expected.accuracy.token_accuracy < 0.8
    for ranks in zip(*run_ranks(validate_layouts, str(tmp_path), layouts, num_ranks=2)):
        for found in ranks:
            assert found.accuracy == expected.accuracy
            # Ranks add in another order.
            assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_weights_of_text_and_of_synthetic_tasks_do_not_mix(data: DataConfig, tmp_path: Path) -> None:
    config = synthetic_config(tmp_path / "run", train__steps=2, schedule__warmup_steps=1)
    assert train(config) == 0
    trained = read_weights(tmp_path / "run")
    model = HybridModel(config.model, single_rank_groups(), seed=9)
    load_initial_weights(model, tmp_path / "run", trained.tokenizer_identity())
    assert all(torch.equal(weight, trained.state[name]) for name, weight in model.state_dict().items())
    with pytest.raises(
        ValueError, match="was trained on a synthetic task, and this run is on text; tokens mean other things"
    ):
        load_initial_weights(model, tmp_path / "run", "a tokenizer")
    with pytest.raises(ValueError, match="was trained on text, and this run is on a synthetic task"):
        load_initial_weights(model, weights_folder(data, tmp_path / "text", "own"), trained.tokenizer_identity())
    with pytest.raises(ValueError, match="was trained on a synthetic task and knows no text"):
        _ = trained.tokenizer


def test_a_task_beyond_the_vocabulary_or_of_another_name_is_refused(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "own")
    found = evaluate_synthetic(folder, "parity", num_rows=3, sequence_length=5)
    assert (found.accuracy.num_labels, found.chance) == (15, 0.5), "any model with enough tokens can be asked"
    with pytest.raises(
        ValueError, match=r"the synthetic task mqar has 1033 tokens with these settings, and .* model\.vocab_size="
    ):
        evaluate_synthetic(folder, "mqar", overrides=["num_keys=1000"])
    with pytest.raises(ValueError, match=r"task=s3 cannot be set on the synthetic task parity"):
        evaluate_synthetic(folder, "parity", overrides=["task=s3"])
    with pytest.raises(ValueError, match=r"override keys=3: unknown key; did you mean num_keys"):
        evaluate_synthetic(folder, "mqar", overrides=["keys=3"])
