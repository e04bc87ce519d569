"""Sparse upcycling: the feed-forwards of a dense model become experts, written as a weights folder that a run trains on.

A feed-forward in C copies, each cut into G slices of its inner width, is E = C G experts: expert c G + g has slice g of copy
c. The router has one row per copy, drawn at random, which its slices share, so that a token chooses whole copies: top_k is
G times the copies per token. The chosen weights are normalized and multiplied by G, so each copy's slices add up to its
feed-forward, copies are alike, and the weights of the copies add up to 1: the model computes what the dense one does, and
no weight is scaled. Ties between slices of a copy go to the lower id in every backend of `route`.

Experts part only by their tokens, or from the start by `noise` and `reset`, which are not exact; what they change is
measured next to the dense model on text. Sources: Komatsuzaki et al. 2023 (arXiv 2212.05055), He et al. 2024 (arXiv
2410.07524) for slices, Nakamura et al. 2025 (arXiv 2502.19261) for units that are drawn again.

Experts are made when they are asked for, one matrix at a time, by a generator of their own name: the same numbers in every
read, and memory for one matrix of a feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.terminal import Report, silent
from amfm.model.config.checks import check_model
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters
from amfm.model.init import named_seed
from amfm.model.on_demand import OnDemand, Source, on_demand, source_of
from amfm.model.packing import PackMeta
from amfm.pretrain.config.convert import UpcycleConfig
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.export.export import proof_text, stream_model
from amfm.pretrain.inference.weights import Weights
from amfm_convert.stages import EXPERTS, FEED_FORWARD, conversion_of, converted_blocks, folder_of
from amfm_convert.weights import read_teacher, write_folder

# Two float32 sums in another order; logits of order 10, as of an export's verification.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class UpcycleReport:
    """The model that was written, and how far it is from the dense one on some text: logits, and nats per token of both."""

    result: Path
    model: ModelConfig
    parameters: tuple[int, int]
    active: tuple[int, int]
    max_logit_difference: float
    losses: tuple[float, float]
    compared: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values; pairs are of the dense model and of the new one."""
        return {
            "pattern": self.model.parsed_pattern.canonical(),
            "parameters": list(self.parameters),
            "active_parameters": list(self.active),
            "max_logit_difference": self.max_logit_difference,
            "losses": list(self.losses),
            "compared": self.compared,
        }


def upcycle(config: RunConfig, report: Report = silent) -> UpcycleReport:
    """Write `run.dir/result`, the upcycled model, after holding it against the dense one on text.

    Raises ValueError for a teacher that does not fit and a result that is there, RuntimeError if a model that should be
    exact is not: then nothing is written.
    """
    result = folder_of(config, "result")
    check_free(result)
    report("reading the teacher")
    teacher = read_teacher(config, report)
    made = upcycled(config, teacher)
    report("comparing with the dense model")
    difference, losses, compared = compare(teacher, made)
    settings = conversion_of(config).upcycle
    assert settings is not None, "only configurations with convert.upcycle come here"
    if settings.is_exact() and not difference <= TOLERANCE:
        raise RuntimeError(
            f"logits of the upcycled model differ from the dense one's by up to {difference:.2e} on {compared}, at most "
            f"{TOLERANCE:.0e} is allowed; nothing is written"
        )
    report("writing the result")
    write_folder(result, made)
    counts = count_parameters(teacher.model), count_parameters(made.model)
    parameters, active = (counts[0].total, counts[1].total), (counts[0].active, counts[1].active)
    return UpcycleReport(result, made.model, parameters, active, difference, losses, compared)


def upcycled_model(model: ModelConfig, settings: UpcycleConfig, blocks: tuple[int, ...]) -> ModelConfig:
    """The configuration with experts instead of these feed-forwards."""
    dense, pattern = model.feed_forward, model.parsed_pattern
    assert dense is not None, "the pattern has -, the configuration no feed_forward section"
    letters = tuple(EXPERTS if index in blocks else symbol for index, symbol in enumerate(pattern.letters))
    moe = MoeConfig(
        num_experts=settings.num_copies * settings.num_slices,
        top_k=settings.top_copies * settings.num_slices,
        expert_hidden_size=dense.hidden_size // settings.num_slices,
        activation=dense.activation,
        activation_limit=dense.activation_limit,
        router=settings.router,
        expert_bias=settings.router == "sigmoid",
        normalize_probabilities=True,
        routed_scaling=float(settings.num_slices),
    )
    is_left = FEED_FORWARD in letters
    changes = {"pattern": replace(pattern, letters=letters).canonical(), "moe": moe}
    made = model.model_copy(update=changes if is_left else changes | {"feed_forward": None})
    check_model(made)
    return made


def upcycled(config: RunConfig, teacher: Weights) -> Weights:
    """The upcycled model, whose experts are built from the teacher's feed-forwards on demand."""
    settings, blocks = conversion_of(config).upcycle, converted_blocks(config)
    assert settings is not None, "only configurations with convert.upcycle come here"
    model = upcycled_model(teacher.model, settings, blocks)
    given = on_demand(teacher.without_depths().state)
    sources = dict(given.sources)
    for index in blocks:
        place = f"blocks.{index}.mixer."
        up, down = (sources.pop(f"{place}{name}_proj.weight") for name in ("up", "down"))
        made = Copies(settings, place, config.train.seed, up, down)
        sources[f"{place}experts.up"], sources[f"{place}experts.down"] = made.up_source(), made.down_source()
        sources[f"{place}router.weight"] = source_of(made.router(model.hidden_size, model.initializer_range))
        if settings.router == "sigmoid":
            sources[f"{place}expert_bias"] = source_of(torch.zeros(settings.num_copies * settings.num_slices))
    origin = f"upcycled from {teacher.origin}"
    return Weights(
        model.without_depths(), OnDemand(sources), teacher.given_tokenizer, origin, released=teacher.released
    )


@dataclass(frozen=True)
class Copies:
    """The experts of one feed-forward, made when they are asked for.

    `place`: its name in the model, from which the draws of its experts follow. Matrices are [out, in], as ours.
    """

    settings: UpcycleConfig
    place: str
    seed: int
    up: Source
    down: Source

    @property
    def num_experts(self) -> int:
        """Copies times slices."""
        return self.settings.num_copies * self.settings.num_slices

    @property
    def units(self) -> int:
        """Inner units of an expert."""
        return self.down.shape[1] // self.settings.num_slices

    def router(self, width: int, deviation: float) -> Tensor:
        """The router's first rows, [E, D]: one per copy, which its slices share."""
        rows = torch.empty(self.settings.num_copies, width)
        rows.normal_(0.0, deviation, generator=self.generator("router"))
        return rows.repeat_interleave(self.settings.num_slices, 0)

    def up_source(self) -> Source:
        """First matrices of all experts, [E, m F / G, D]: rows of the m = 1 or 2 matrices of the activation below each other."""
        inner, units = self.down.shape[1], self.units

        def make(expert: int) -> Tensor:
            first = expert % self.settings.num_slices * units
            starts = range(first, self.up.shape[0], inner)
            rows = torch.stack([self.up.read(start, start + units).float() for start in starts])
            return self.varied("up", expert, rows, dim=1).flatten(0, 1)

        shape = (self.num_experts, self.up.shape[0] // self.settings.num_slices, self.up.shape[1])
        return Source(shape, torch.float32, lambda start, stop: torch.stack([make(e) for e in range(start, stop)]))

    def down_source(self) -> Source:
        """Second matrices of all experts, [E, D, F / G]."""

        def read(start: int, stop: int) -> Tensor:
            slices = self.down.read(0, self.down.num_rows).float().split(self.units, dim=1)
            each = ((expert, slices[expert % len(slices)]) for expert in range(start, stop))
            return torch.stack([self.varied("down", expert, part, dim=1) for expert, part in each])

        return Source((self.num_experts, self.down.shape[0], self.units), torch.float32, read)

    def varied(self, matrix: str, expert: int, part: Tensor, *, dim: int) -> Tensor:
        """An expert's matrix with some units along `dim` drawn again, and noise; the same in every call."""
        if self.settings.is_exact():
            return part
        deviation, mean, drawn = part.std(), part.mean(), self.generator(f"experts.{expert}.{matrix}")
        # The same units in both matrices.
        is_new = torch.rand(self.units, generator=self.generator(f"experts.{expert}.units")) < self.settings.reset
        shape = [1] * part.dim()
        shape[dim] = self.units
        new = mean + deviation * torch.empty_like(part).normal_(generator=drawn)
        noise = self.settings.noise * deviation * torch.empty_like(part).normal_(generator=drawn)
        return torch.where(is_new.view(shape), new, part + noise)

    def generator(self, name: str) -> torch.Generator:
        """A generator that is of only this name."""
        return torch.Generator().manual_seed(named_seed(self.seed, f"{self.place}{name}"))


@torch.no_grad()
def compare(dense: Weights, made: Weights) -> tuple[float, tuple[float, float], str]:
    """Compare two models on text, holding one block of each: the largest difference of logits, and nats per token of both."""
    tokens_BT, _, compared = proof_text(dense)
    meta = PackMeta.one_document_a_row(*tokens_BT.shape)
    logits, losses = [], []
    for weights in (dense.without_depths(), made):
        found = stream_model(weights)(tokens_BT, meta).logits_BTV
        assert found is not None, "no labels were given"
        logits.append(found)
        losses.append(float(cross_entropy(found[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())))
    return float((logits[0] - logits[1]).abs().max()), (losses[0], losses[1]), compared
