"""Merge checkpoints of a run: the weighted mean of their weights, read and written some rows at a time.

At a constant rate, the mean of the last checkpoints is what a decay of the rate would have given: with checkpoints oldest
first, weight c_j of each, the update between two of them counts with the sum of the weights from there on. So equal weights
stand for a linear decay, and any decay has its weights (WSM, arXiv 2507.17634).

The weighted mean of models, read and computed some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.terminal import Report, silent
from amfm.model.moe.block import PRUNED_BIAS
from amfm.model.on_demand import OnDemand, Source, on_demand
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints, step_of
from amfm.pretrain.export.import_huggingface import write_model
from amfm.pretrain.inference.evaluate import evaluate_checkpoint
from amfm.pretrain.inference.weights import Weights, read_weights

KINDS = ("uniform", "wsm", "linear")


@dataclass(frozen=True)
class Merge:
    """Checkpoints to merge: their steps and the weight of each, and the loss of the result where it was measured."""

    steps: tuple[int, ...]
    weights: tuple[float, ...]
    loss: float | None = None


def merge_shares(weights: str, count: int) -> tuple[float, ...]:
    """Weights of `count` checkpoints, oldest first; they add up to 1.

    uniform: equal, a linear decay; wsm: those that stand for a decay by 1 - sqrt, where the oldest counts most; linear:
    growing with the place, 1 to `count`; or numbers with commas. Raises ValueError.
    """
    match weights:
        case "uniform":
            return (1 / count,) * count
        case "wsm":
            return tuple(math.sqrt((place + 1) / count) - math.sqrt(place / count) for place in range(count))
        case "linear":
            return tuple(2 * (place + 1) / (count * (count + 1)) for place in range(count))
    try:
        shares = tuple(float(number) for number in weights.split(","))
    except ValueError as error:
        raise ValueError(f"--weights {weights} is none of {', '.join(KINDS)}, nor numbers with commas") from error
    if len(shares) != count:
        raise ValueError(f"--weights {weights} has {len(shares)} numbers for {count} checkpoints; give one for each")
    if not abs(sum(shares) - 1) <= 1e-6:  # NaN fails too
        raise ValueError(f"--weights {weights} add up to {sum(shares):g}; they must add up to 1")
    return shares


def choose_merge(run_dir: Path, last: int | None, steps: Sequence[int] | None, weights: str) -> Merge:
    """The checkpoints that are asked for, by number of newest ones or by step, with their weights.

    Raises ValueError for a step or a number that the run does not have.
    """
    there = sorted(map(step_of, list_checkpoints(_folder(run_dir))))
    kept = f"{run_dir} has checkpoints of steps {', '.join(map(str, there)) or '(none)'}"
    more = "train.keep_last and train.keep_every_steps keep more"
    if steps is None:
        assert last is not None, "one of them"
        if last > len(there):
            raise ValueError(f"--last {last}: {kept}; {more}")
        steps = there[-last:]
    missing = [step for step in steps if step not in there]
    if missing:
        raise ValueError(f"--steps {','.join(map(str, missing))}: {kept}; {more}")
    if len(set(steps)) < len(steps):
        raise ValueError(f"--steps {','.join(map(str, steps))} names a step twice; give each once")
    return Merge(tuple(steps), merge_shares(weights, len(steps)))


def read_merge(run_dir: Path, merge: Merge, report: Report = silent) -> Weights:
    """Read the merged weights of checkpoints, each verified first. Raises RuntimeError for a damaged one."""
    folders = {step_of(path): path for path in reversed(list_checkpoints(_folder(run_dir)))}
    return average([read_weights(folders[step], report) for step in merge.steps], merge.weights)


def merge_checkpoints(
    run_dir: Path,
    merges: Sequence[Merge],
    out: Path | None,
    *,
    evaluate: bool,
    max_tokens: int | None = None,
    device: str = "cpu",
    report: Report = silent,
) -> list[Merge]:
    """Measure merges on the run's held-out text where asked, and write the best, or the only one, to OUT.

    Returns them with their losses. OUT is a weights folder, whole or not at all; None: write nothing.
    """
    if out is not None:
        check_free(out)
    measured = []
    for merge in merges:
        loss = None
        if evaluate:
            what = f"measuring the merge of {len(merge.steps)}"
            report(what)
            weights = read_merge(run_dir, merge, report)
            found = evaluate_checkpoint(
                weights,
                max_tokens=max_tokens,
                device=device,
                report=report,
                progress=lambda *_, what=what: report(what),
            )  # once the weights are there, which are read on the way
            loss = found.loss
        measured.append(replace(merge, loss=loss))
    if out is not None:
        weights = read_merge(run_dir, best_of(measured), report)
        _ = weights.vocabulary  # raises if there is none, before anything is written
        report(f"writing {out}")
        write_model(out, weights)
    return measured


def best_of(merges: Sequence[Merge]) -> Merge:
    """The merge of the lowest loss; the first if none was measured."""
    return min(merges, key=lambda merge: math.inf if merge.loss is None or math.isnan(merge.loss) else merge.loss)


def _folder(run_dir: Path) -> Path:
    """The folder of a run's checkpoints, or a folder of checkpoints itself."""
    return run_dir / "checkpoints" if (run_dir / "checkpoints").is_dir() else run_dir


EXPERT_BIAS = ".expert_bias"


def average(parts: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """The weighted mean of models, summed in float64 and rounded once, computed when it is asked for.

    Positions, tokens and the tokenizer are those of the part after the most steps. Raises ValueError if tensors differ in
    name or shape.
    """
    newest = max(parts, key=lambda part: part.step or 0)
    states = [on_demand(part.state) for part in parts]
    wanted = on_demand(newest.state)
    for part, state in zip(parts, states):
        shapes = [{name: each.shape(name) for name in each} for each in (state, wanted)]
        differing = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{part.origin} and {newest.origin} hold other tensors: {name} is {shapes[0].get(name, 'absent')} and "
                f"{shapes[1].get(name, 'absent')} ({len(differing)} differ); merge checkpoints of one model"
            )
    sources = {
        name: Source(
            source.shape, source.dtype, partial(_rows, [state.sources[name] for state in states], shares, name)
        )
        for name, source in wanted.sources.items()
    }
    origin = f"merge of {', '.join(part.origin for part in parts)} by {', '.join(f'{share:.4g}' for share in shares)}"
    return replace(newest, state=OnDemand(sources), origin=origin, validation_loss=None)


def _rows(sources: Sequence[Source], shares: Sequence[float], name: str, start: int, stop: int) -> Tensor:
    """Rows of the mean of a tensor. An expert that one part has pruned stays pruned: its bias is a mark, no number."""
    total: Tensor | None = None
    is_pruned: Tensor | None = None
    for source, share in zip(sources, shares):
        rows = source.read(start, stop)
        if not rows.is_floating_point():
            raise ValueError(f"{name} holds {rows.dtype}, which have no mean")
        if name.endswith(EXPERT_BIAS):
            marked = rows <= PRUNED_BIAS / 2
            is_pruned = marked if is_pruned is None else is_pruned | marked
        total = rows.double().mul_(share) if total is None else total.add_(rows.double(), alpha=share)
    assert total is not None, "there is a part"
    mean = total.float()
    return mean if is_pruned is None else torch.where(is_pruned, PRUNED_BIAS, mean)
