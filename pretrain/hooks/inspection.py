"""Norms, logits and routing by block and by group of parameters, every N steps (`train.inspect_every_steps`).

Each rank adds up squares of what it holds, one reduction over all ranks joins them, and a second the largest logits. So numbers are
those of one rank under every layout, and a pipeline's stages each bring their blocks. Other steps pay nothing.

    before the passes     outputs of blocks and entropies of routers are noted in every forward pass, heads raise their largest logit
    before the update     squares of the reduced gradients, before clipping
    around the optimizer  each master is copied, one call of the optimizer at a time, for the length of its update
    after the step        squares of the master weights, biases of routers, loads of experts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from amfm.model.block import Block
from amfm.pretrain.checkpoint.save import ranks_of
from amfm.pretrain.config.optimizers import DecayFactors, RateFactors, group_of
from amfm.pretrain.engine.grad_norm import Piece
from amfm.pretrain.engine.optimizer import decays
from amfm.pretrain.engine.parts import Part, list_parts, name_parameters, parameter_shape
from amfm.pretrain.hook import Hook
from amfm.pretrain.hooks.qk_clip import HeadMaxima
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.run import Run
from amfm.pretrain.stages import is_due
from amfm.pretrain.step_sums import StepResult

GROUPS = tuple(name for name in RateFactors.model_fields if name != "adamw")
assert set(DecayFactors.model_fields) <= set(GROUPS)
NORMS = ("weight", "gradient", "update")
# Of each block, after the squares of NORMS: squares and numbers of its outputs, entropies and tokens of its router, and of its
# balancing biases lowest, highest, mean, and how many ranks tell.
NOTED = ("output", "outputs", "entropy", "tokens", "bias_low", "bias_high", "bias_mean", "tellers")
NUM_EXPERTS_SHOWN = 3


class Inspection(Hook):
    """Puts `inspect` into the line of a step that is due: lists by block, mappings by group."""

    def __init__(self, run: Run, every_steps: int) -> None:
        self.run, self.every_steps = run, every_steps
        model, device = run.model, run.parallel.device
        self.num_blocks = len(model.config.built_letters)
        self.rows = self.find_rows()
        self.sums = torch.zeros(
            self.num_blocks + len(GROUPS), len(NORMS) + len(NOTED), dtype=torch.float64, device=device
        )
        self.noted = {index: torch.zeros(4, dtype=torch.float32, device=device) for index, _ in model.all_blocks()}
        # A run that clips has noted every step's already.
        self.heads = None if run.config.qk_clip is not None else HeadMaxima(model, ranks_of(run.engine), device)
        self.parameters = {name: model.get_parameter(name) for name in name_parameters(model).values()}
        self.parts = {id(part.master): part for part in list_parts(run.engine.deepspeed)}
        self.before: dict[int, Tensor] = {}
        self.handles: list[Any] = []
        # What is compiled or replayed notes always, or not at all.
        self.notes_always = run.config.train.compile or run.config.train.cuda_graphs != "none"
        self.listen(self.notes_always)

    def find_rows(self) -> dict[int, tuple[int, ...]]:
        """Rows of `sums` that a parameter, by `id`, counts in: its block and its group."""
        blocks = {id(p): (index,) for index, block in self.run.model.all_blocks() for p in block.parameters()}
        found = {}
        for key, name in name_parameters(self.run.model).items():
            shape = torch.Size(parameter_shape(self.run.model.get_parameter(name)))
            group = GROUPS.index(group_of(name, is_matrix=decays(name, shape)))
            found[key] = (*blocks.get(key, ()), self.num_blocks + group)
        return found

    def is_due(self) -> bool:
        """Whether the step under way is inspected."""
        return is_due(self.run.progress.step + 1, self.every_steps)

    def listen(self, listens: bool) -> None:
        """Have mixers note largest logits and entropies, or no longer."""
        for mixer, place in [] if self.heads is None else self.heads.mixers:
            mixer.highest_logits_H = self.heads.flat[place] if listens and self.heads is not None else None
        for index, block in self.run.model.all_blocks():
            block.mixer.note_entropies(self.noted[index][2:] if listens else None)

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Begin in a step that is due; passes that are taken again start over."""
        self.close()
        if not self.is_due():
            return
        self.sums.zero_()
        for noted in self.noted.values():
            noted.zero_()
        if self.heads is not None:
            self.heads.flat.fill_(-torch.inf)
        self.listen(True)
        for index, block in self.run.model.all_blocks():
            self.handles.append(block.register_forward_hook(partial(self.note_output, self.noted[index])))
            self.handles.append(NotedAdvance(block, partial(self.note_output, self.noted[index])))

    @staticmethod
    def note_output(sums: Tensor, block: nn.Module, inputs: Any, output: Any) -> None:
        """Add squares and number of what a block adds to the residual stream, in training."""
        if output is not None and block.training:
            y_BTD = output[1].y_BTD.detach()
            sums[0] += torch.linalg.vector_norm(y_BTD, dtype=torch.float32).square()
            sums[1] += y_BTD.numel()

    def before_update(self) -> None:
        """Take the gradients, and wait for the optimizer."""
        if not self.is_due():
            return
        self.close()
        engine = self.run.engine
        copies = engine.data_world_size if engine.zero_stage == 0 else 1
        self.add("gradient", engine.norm.gradient_pieces(engine.deepspeed), copies)
        self.handles = [
            engine.adamw.register_step_pre_hook(lambda optimizer, *_: self.copy_masters(optimizer)),
            engine.adamw.register_step_post_hook(lambda optimizer, *_: self.take_updates(optimizer)),
        ]

    @torch.no_grad()
    def copy_masters(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what this call of the optimizer steps, in float32."""
        for group in optimizer.param_groups:
            for master in group["params"]:
                if id(master) in self.parts:
                    self.before[id(master)] = master.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def take_updates(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the updates of the master weights that this call has stepped; a nested call has taken its own already."""
        for group in optimizer.param_groups:
            for master in group["params"]:
                before = self.before.pop(id(master), None)
                if before is not None:
                    self.add_part("update", self.parts[id(master)], before.sub_(master.detach()))

    @torch.no_grad()
    def after_step(self, result: StepResult) -> None:
        """Add up what all ranks have, and report."""
        run = self.run
        if not is_due(run.progress.step, self.every_steps):
            return
        self.close()
        self.before.clear()
        for part in self.parts.values():
            self.add_part("weight", part, part.master.detach())
        for index, block in run.model.all_blocks():
            self.sums[index, len(NORMS) : len(NORMS) + 4] = self.noted[index].double()
            bias_E = block.mixer.living_bias()
            if bias_E is not None:
                self.sums[index, len(NORMS) + 4 :] = describe_bias(bias_E)
        if run.parallel.world_size > 1:
            torch.distributed.all_reduce(self.sums)
        logits = result.found.get("qk_clip", {}).get("max_logit", {})
        if self.heads is not None and self.heads.sizes:
            logits = self.heads.largest_by_block(self.heads.of_all_ranks())
        result.found["inspect"] = self.describe(self.sums.tolist(), logits) | describe_experts(result.expert_counts)

    def add(self, kind: str, pieces: Sequence[Piece], copies: int) -> None:
        """Add squares of pieces, of which so many data ranks have the same, to the sums of their blocks and groups."""
        column = self.sums[:, NORMS.index(kind)]
        for squares, names in self.run.engine.norm.squares(pieces):
            pairs = [(row, place) for place, name in enumerate(names) for row in self.rows[name]]
            rows, places = torch.tensor(pairs, device=column.device).unbind(1)
            column.index_add_(0, rows, squares.to(column)[places] / copies)

    def add_part(self, kind: str, part: Part, flat: Tensor) -> None:
        """Add squares of a tensor that has the places of a part's master."""
        flat = flat.reshape(-1)
        pieces = [
            (self.parameters[span.name], flat[span.flat_start : span.flat_start + span.numel], span.start)
            for span in part.spans
        ]
        self.add(kind, pieces, len(part.data_ranks) if part.replicated else 1)

    def describe(self, sums: list[list[float]], logits: dict[str, float | None]) -> dict[str, Any]:
        """What all ranks have added up, as numbers; a measure that no block has is left out."""
        blocks, groups = sums[: self.num_blocks], dict(zip(GROUPS, sums[self.num_blocks :]))
        noted = [dict(zip(NOTED, row[len(NORMS) :])) for row in blocks]
        measures: dict[str, Iterable[float | None]] = {
            name: [math.sqrt(row[place]) for row in blocks] for place, name in enumerate(NORMS)
        }
        measures["activation"] = [divide(row["output"], row["outputs"], math.sqrt) for row in noted]
        measures["max_logit"] = [logits.get(str(index)) for index in range(self.num_blocks)]
        measures["router_entropy"] = [divide(row["entropy"], row["tokens"]) for row in noted]
        for name in ("bias_low", "bias_high", "bias_mean"):
            measures[name] = [divide(row[name], row["tellers"]) for row in noted]
        lists = {name: [None if value is None else finite(value) for value in row] for name, row in measures.items()}
        return {
            "blocks": {name: row for name, row in lists.items() if any(value is not None for value in row)},
            "groups": {
                name: {group: finite(math.sqrt(row[place])) for group, row in groups.items() if row[0] > 0}
                for place, name in enumerate(NORMS)
            },
        }

    def close(self) -> None:
        """Stop noting."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.listen(self.notes_always)


class NotedAdvance:
    """Calls `note` with what `Block.advance` gives at the end of a block's steps, which hooks of modules do not see."""

    def __init__(self, block: Block, note: Callable[[Block, Any, Any], None]) -> None:
        self.block, self.advance = block, block.advance
        self.note = note
        vars(block)["advance"] = self.call

    def call(self, steps: Any) -> Any:
        """Continue the steps."""
        done = self.advance(steps)
        self.note(self.block, None, done)
        return done

    def remove(self) -> None:
        """Let the block advance as before."""
        vars(self.block).pop("advance", None)


def describe_bias(bias_E: Tensor) -> Tensor:
    """Lowest, highest and mean bias of the experts that have one, and a 1; on the device, [4] float64."""
    low, high = bias_E.nan_to_num(torch.inf).min(), bias_E.nan_to_num(-torch.inf).max()
    return torch.stack([low, high, bias_E.nanmean(), bias_E.new_ones(())]).double()


def describe_experts(counts: dict[int, list[int]]) -> dict[str, Any]:
    """The experts of each block with most and fewest tokens, each as its number and its load over the mean."""
    found: dict[str, dict[str, list[list[float]]]] = {"top": {}, "bottom": {}}
    for block, own in counts.items():
        mean = max(1, sum(own)) / len(own)
        ranked = sorted(range(len(own)), key=lambda expert: (-own[expert], expert))
        for name, experts in (("top", ranked[:NUM_EXPERTS_SHOWN]), ("bottom", ranked[: -NUM_EXPERTS_SHOWN - 1 : -1])):
            found[name][str(block)] = [[expert, own[expert] / mean] for expert in experts]
    return {"experts": found} if counts else {}


def divide(total: float, number: float, then: Callable[[float], float] = float) -> float | None:
    """A mean of what was noted, and a function of it; None if nothing was."""
    return then(total / number) if number else None
