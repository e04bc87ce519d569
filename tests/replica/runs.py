"""The same training twice: a model of transformers by the plain loop, and by a run of ours from the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from amfm.data_pipeline.batch import Batch
from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.monitor.signals import SignalWatch
from amfm.pretrain.start import close_run, start_run
from amfm.pretrain.step import train_step
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.tiny_run import tiny_config
from tests.replica.families import FAMILIES, SHARED, Family
from tests.replica.faults import FAULTS
from tests.replica.plain import IGNORED, Document, PlainStep, Recipe, Step, train_plainly

ROWS, MICRO_ROWS, LENGTH, SEED = 4, 2, 64, 0
# Two float32 programs agree to this share of the loss, or the norm, of a step.
TOLERANCE = 1e-6
# Two scores nearer than this (of order 1, after sums of float32 in other orders) may change places.
TIE = 1e-6

SEQUENCE = {"tensor": 2, "sequence_parallel": True}
# By number of ranks.
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"tensor": 2},
        SEQUENCE,
        {"expert": 2},
        {"pipeline": 2},
        {"context": 2},
    ],
    4: [SEQUENCE | {"context": 2}, SEQUENCE | {"pipeline": 2}, {"tensor": 2, "expert": 2, "zero_stage": 2}],
}


def name_of(layout: dict[str, Any]) -> str:
    """What a table calls a layout."""
    return ", ".join(f"{key}={value}" for key, value in layout.items()) or "one rank"


@dataclass(frozen=True)
class OurStep:
    """Loss and gradient norm of a step, and choices by router and expert."""

    loss: float
    norm: float
    counts: list[list[int]]


@dataclass(frozen=True)
class Comparison:
    """How far two runs agree: the largest gaps of loss and norm in steps 1 to `steps`, as shares.

    tie: the margin of the choice that differed in the step after these; None where all steps were compared.
    """

    steps: int
    loss: float
    norm: float
    tie: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether all is within the tolerance until the end, or until a choice that rounding decides."""
        return max(self.loss, self.norm) <= TOLERANCE and (self.tie is None or self.tie <= TIE)


def compare(plain: Sequence[PlainStep], ours: Sequence[OurStep]) -> Comparison:
    """Compare step by step, until a router chooses otherwise."""
    loss = norm = 0.0
    for number, (expected, found) in enumerate(zip(plain, ours, strict=True)):
        if expected.counts != found.counts:
            return Comparison(number, loss, norm, expected.margin)
        loss = max(loss, abs(found.loss - expected.loss) / expected.loss)
        norm = max(norm, abs(found.norm - expected.norm) / expected.norm)
    return Comparison(len(plain), loss, norm)


def documents_of(batch: Batch) -> list[list[Document]]:
    """The documents of each row; labels are the next tokens, of which the last one of a row may lie beyond it."""
    rows = []
    for row in range(len(batch.tokens_BT)):
        tokens, labels, ids = (values[row] for values in (batch.tokens_BT, batch.labels_BT, batch.document_ids_BT))
        documents = []
        for number in ids.unique():
            own = ids == number
            text, last = tokens[own].tolist(), int(labels[own][-1])
            if not bool(own[-1]):
                assert last == IGNORED, "a label lies in another document"
            documents.append(Document(text, [*text[1:], last]))
        rows.append(documents)
    return rows


def read_steps(data: DataConfig, steps: int) -> list[Step]:
    """The rows of a run's steps, in its micro-batches."""
    loader = PretrainLoader(data, sequence_length=LENGTH, micro_batch_size=MICRO_ROWS, seed=SEED)
    return [[documents_of(batch) for batch in loader.take(ROWS, MICRO_ROWS)] for _ in range(steps)]


def make_model(family: Family) -> Any:
    """A model of the class with the weights that transformers gives it, and norms and biases that matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    config = AutoConfig.for_model(family.name, **SHARED | family.fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                # The first values of some heads forget all within a token: AdamW would take full steps of gradients that
                # are nothing but rounding.
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif parameter.dim() == 1 and not name.endswith("dt_bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run_config(family: Family, folder: Path, run_dir: Path, data: DataConfig, parallel: dict[str, Any]) -> RunConfig:
    """The run of ours that continues the imported weights with the family's recipe."""
    recipe = family.recipe
    tree = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
    tree["model"]["moe"] |= {
        "auxiliary_loss_weight": recipe.balance,
        "sequence_loss_weight": recipe.sequence,
        "z_loss_weight": recipe.z,
        "bias_update_rate": recipe.bias_rate,
    }
    config = tiny_config(
        data,
        run_dir,
        run__initial_weights=str(folder),
        train__steps=recipe.steps,
        train__sequence_length=LENGTH,
        train__micro_batch_size=MICRO_ROWS,
        train__global_batch_size=ROWS,
        train__seed=SEED,
    ).model_dump(mode="json")
    config["optimizer"] |= {
        "learning_rate": recipe.rate,
        "beta1": recipe.betas[0],
        "beta2": recipe.betas[1],
        "epsilon": recipe.epsilon,
        "weight_decay": recipe.weight_decay,
        "clip_grad_norm": recipe.clip,
    }
    config["schedule"] |= {
        "kind": "wsd",
        "warmup_steps": recipe.warmup,
        "decay_steps": recipe.decay,
        "min_ratio": recipe.min_ratio,
    }
    return RunConfig.model_validate(config | tree | {"parallel": {"zero_stage": 1} | parallel})


def train_ours(config: RunConfig) -> list[OurStep]:
    """Train by our loop. Every rank must call this."""
    with SignalWatch() as signals:
        run = start_run(config, signals)
        found = []
        for _ in range(config.train.steps):
            result = train_step(run)
            counts = [list(result.expert_counts[block]) for block in sorted(result.expert_counts)]
            found.append(OurStep(result.loss, result.grad_norm, counts))
        close_run(run)
    return found


def train_all(configs: list[RunConfig], fault: str | None) -> list[list[OurStep]]:
    """Train runs one after the other, with a fault planted or none. Every rank must call this."""
    with ExitStack() as planted:
        if fault is not None:
            FAULTS[fault](planted)
        return [train_ours(config) for config in configs]


@dataclass(frozen=True)
class Trained:
    """What both gave in `steps` steps of a class, with the folder of weights and the store that ours began from."""

    family: Family
    folder: TemporaryDirectory[str]
    data: DataConfig
    plain: list[PlainStep]

    def compare_runs(
        self, layouts: Sequence[dict[str, Any]], num_ranks: int, fault: str | None = None
    ) -> list[Comparison]:
        """Train under layouts of so many ranks, with a fault or none, and compare each."""
        weights = Path(self.folder.name, "ours")
        with TemporaryDirectory() as place:
            configs = [
                run_config(self.family, weights, Path(place, str(number)), self.data, layout)
                for number, layout in enumerate(layouts)
            ]
            ranks = run_ranks(train_all, configs, fault, num_ranks=num_ranks)
        assert fault is not None or all(rank == ranks[0] for rank in ranks), "ranks report other numbers"
        return [compare(self.plain, ours) for ours in ranks[0]]


@cache
def trained(name: str, steps: int | None = None) -> Trained:
    """Make a model of the class, import it, and train it by the plain loop."""
    family = FAMILIES[name]
    if steps is not None:
        recipe: Recipe = replace(family.recipe, steps=steps, warmup=2, decay=2)
        family = replace(family, recipe=recipe)
    torch.set_num_threads(1)
    model = make_model(family)
    folder, data = import_model(model)
    return Trained(family, folder, data, train_plainly(model, read_steps(data, family.recipe.steps), family.recipe))


def import_model(model: Any) -> tuple[TemporaryDirectory[str], DataConfig]:
    """A folder with the model as ours under `ours`, and a store of text."""
    folder = TemporaryDirectory()
    data = make_tiny_store(Path(folder.name, "data"), num_documents=300, mean_words=14)
    theirs = Path(folder.name, "theirs")
    model.save_pretrained(theirs)
    (theirs / "tokenizer.model").write_bytes((Path(data.text_store()) / "tokenizer.model").read_bytes())
    import_huggingface(theirs, Path(folder.name, "ours"))
    return folder, data
