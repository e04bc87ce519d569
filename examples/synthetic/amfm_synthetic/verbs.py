"""What `amfm evaluate --synthetic` measures and prints, and what `amfm inspect --sample` shows of a synthetic task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from amfm.launch.console import print_json, print_pairs, show_progress

if TYPE_CHECKING:
    from amfm.data_pipeline.config import DataConfig, TaskName
    from amfm.launch.arguments import Place


def evaluate_on_synthetic(
    checkpoint: Path,
    task: TaskName,
    settings: list[str],
    sequence_length: int | None,
    num_rows: int | None,
    place: Place,
    *,
    as_json: bool,
) -> None:
    """Measure and print the accuracy of a checkpoint on a synthetic task."""
    from amfm_synthetic.evaluate import DEFAULT_ROWS, evaluate_synthetic

    with show_progress("evaluate", every_seconds=5.0) as show:
        found = evaluate_synthetic(
            checkpoint,
            task,
            overrides=settings,
            sequence_length=sequence_length,
            num_rows=num_rows or DEFAULT_ROWS,
            device=place.device,
            backend=place.backend,
            progress=lambda done, total: show(done, total, "rows"),
        )
    accuracy = found.accuracy
    if as_json:
        print_json(
            {
                "probe": found.task,
                "settings": found.settings,
                "sequence_length": found.sequence_length,
                "accuracy": accuracy.token_accuracy,
                "row_accuracy": accuracy.row_accuracy,
                "chance": found.chance,
                "loss": found.loss,
                "answers": accuracy.num_labels,
                "rows": accuracy.num_rows,
            }
        )
        return
    named = ", ".join(f"{name} {value}" for name, value in found.settings.items())
    pairs = [
        ("task", f"{found.task}{f' ({named})' if named else ''}, rows of {found.sequence_length:,} tokens"),
        (
            "accuracy",
            f"{accuracy.token_accuracy:.4f} of {accuracy.num_labels:,} tokens; guessing gives {found.chance:.4f}",
        ),
        ("sequences without an error", f"{accuracy.row_accuracy:.4f} of {accuracy.num_rows:,}"),
        ("loss", f"{found.loss:.4f} nats a labeled token"),
    ]
    print_pairs(f"Evaluation of {checkpoint}", pairs)


def show_synthetic_row(data: DataConfig, sample: int, sequence_length: int, seed: int, *, as_json: bool) -> None:
    """Print the training row of a global sample, which only the configuration determines."""
    from amfm.data_pipeline.loader.loader import PretrainLoader

    loader = PretrainLoader(data, sequence_length=sequence_length, micro_batch_size=1, seed=seed)
    ((row,), _) = loader.reader.read_block(sample, 1, 1)
    assert row.labels is not None and data.synthetic is not None, "the configuration is of a synthetic task"
    tokens, labels = row.tokens[:-1].tolist(), row.labels.tolist()
    if as_json:
        print_json({"sample": sample, "probe": data.synthetic.task, "tokens": tokens, "labels": labels})
        return
    label_text = ", ".join(f"{label} at {place}" for place, label in enumerate(labels) if label >= 0)
    pairs = [("tokens", " ".join(map(str, tokens))), ("labels", label_text)]
    print_pairs(f"Sample {sample} of the synthetic task {data.synthetic.task}", pairs)
