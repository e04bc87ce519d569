"""Distillation: a teacher says of each micro-batch what comes next, and the loss moves to its probabilities (docs/distillation.md).

The teacher is a second model without gradients and optimizer, cut over tensor and expert ranks as the model is, of which every
data rank has a copy; or a store of what it said (distillation/store.py). Its outcomes and the model's are compared a slice of tokens
at a time (model/divergence.py). A checkpoint holds nothing of it: what the teacher says is a function of its files and the rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.model.divergence import Divergence, HeadRows, Outcomes, StoredRows, TeacherRows, divergence_at_head
from amfm.model.loss import IGNORE_INDEX
from amfm.pretrain.checkpoint.manifest_file import TEACHER_FILE
from amfm.pretrain.config.hook_sections import DistillConfig
from amfm.pretrain.distillation.store import TeacherStore, stored_teacher
from amfm.pretrain.distillation.teacher import Teacher, read_rows, require_same_tokens
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch, MicroBatches, send
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult

LOSS = "distill"


class Reading:
    """A teacher that reads each micro-batch."""

    def __init__(self, teacher: Teacher, run: Run, path: str) -> None:
        weights = teacher.read()
        require_same_tokens(weights, run.identities["tokenizer"], run.config.model.vocab_size, path)
        dtype = torch.bfloat16 if run.config.train.precision == "bf16" else torch.float32
        parallel, backend = run.parallel, run.model.backend
        built = weights.build(backend=backend, device=parallel.device, groups=parallel.groups, dtype=dtype)
        self.model = built.requires_grad_(False)
        size = sum(each.numel() for each in self.model.parameters())
        self.origin, self.words = weights.origin, f"{self.model.config.pattern}, {size:,} parameters on this rank"

    @torch.no_grad()
    def read_rows_of(self, given: MicroBatch, micro_batches: MicroBatches, number: int) -> TeacherRows:
        """Read the tokens that the model is about to read."""
        return HeadRows(read_rows(self.model, given.tokens_BT, given.meta).flatten(0, 1), self.model.head_weight())

    def close(self) -> None:
        """Nothing is open."""


class Stored:
    """A store of what a teacher said."""

    def __init__(self, store: TeacherStore, teacher: Teacher, run: Run) -> None:
        self.store, self.device = store, run.parallel.device
        self.origin, self.words = teacher.folder, f"stored in {store.folder}"

    def read_rows_of(self, given: MicroBatch, micro_batches: MicroBatches, number: int) -> TeacherRows:
        """Read what it said of the samples of a micro-batch, of this context rank's part of them."""
        found = self.store.read(micro_batches.batches[number].sample_ids)
        assert found.chosen_RK is not None, "only the likeliest tokens are stored"
        pair = found.log_p, found.chosen_RK
        if given.meta.segments is not None:
            pair = given.meta.segments.take(pair[0]), given.meta.segments.take(pair[1])
        log_p, chosen = (send(each.flatten(0, 1), self.device) for each in pair)
        return StoredRows(Outcomes(log_p, chosen))

    def close(self) -> None:
        """Close the store."""
        self.store.close()


class Distill(Hook):
    """Adds weight times the divergence less the cross entropy to the loss, as the auxiliary loss `distill`."""

    def __init__(self, section: DistillConfig, run: Run) -> None:
        self.section, self.run = section, run
        self.divergence = Divergence(section.kind, section.temperature, section.top_k)
        self.teacher, self.source = open_teacher(section, run)
        self.share: LossShare | None = None
        self.micro_batches: MicroBatches | None = None
        self.rows: TeacherRows | None = None
        self.sums: deque[Tensor] = deque()
        run.model.losses_at_head.append(self.compare)
        self.handle = run.model.register_forward_pre_hook(self.ask)

    def at_start(self) -> None:
        """Report whose probabilities are learnt, and keep it for later starts."""
        write_file_atomically(self.run.directory / TEACHER_FILE, self.teacher.to_json())
        origin = self.source.origin
        self.run.tell("distill", f"distilling from {origin}: {self.source.words}", teacher=origin)

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Learn how the step's losses are divided. Of the passes to come the last are the step's: others examine it before."""
        assert isinstance(micro_batches, MicroBatches), "with the samples that they are of"
        self.share, self.micro_batches = share, micro_batches
        self.sums = deque(maxlen=len(micro_batches))

    def ask(self, model: nn.Module, given: tuple[Any, ...]) -> None:
        """Let the teacher say what comes next of the micro-batch that the model is about to read."""
        if not model.training:
            return
        assert self.micro_batches is not None, "a step has begun"
        # By its layout: ZeRO 3 hands over other tensors with the same tokens.
        found = ((number, each) for number, each in enumerate(self.micro_batches) if each.meta is given[1])
        number, micro_batch = next(found)
        self.rows = self.source.read_rows_of(micro_batch, self.micro_batches, number)

    def compare(self, read_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> Mapping[str, Tensor]:
        """The loss that the model adds to its auxiliary ones; these are divided by the micro-batches of the step."""
        assert self.share is not None and self.rows is not None, "a pass of training comes after the teacher's"
        teacher, self.rows = self.rows, None
        student = HeadRows(read_BTD.flatten(0, 1), weight_VD)
        total, alone = divergence_at_head(
            student, teacher, labels_BT.flatten(), self.divergence, self.run.parallel.groups
        )
        self.sums.append(torch.stack([alone.double(), (labels_BT != IGNORE_INDEX).sum().double()]))
        factor = self.section.weight * self.share.num_micro_batches / self.share.valid_tokens
        return {LOSS: total * factor}

    def after_step(self, result: StepResult) -> None:
        """Report the mean divergence a token."""
        divergence, tokens = self.run.parallel.all_reduce_unique(torch.stack(tuple(self.sums)).sum(0)).tolist()
        result.found["divergence"] = finite(divergence / max(1.0, tokens))

    def close(self) -> None:
        """Let go of the model and the teacher."""
        self.source.close()
        self.handle.remove()
        self.run.model.losses_at_head.remove(self.compare)


def open_teacher(section: DistillConfig, run: Run) -> tuple[Teacher, Reading | Stored]:
    """Find and open the teacher, that of earlier starts in this run directory if there were any. Every rank must call this."""
    ranks = run.saver.ranks
    found: Any = None
    if ranks.rank == 0:
        try:
            found = find_teacher(section, run)
        except (ValueError, RuntimeError, OSError) as error:
            found = error  # of all ranks, or the others would wait
    found = ranks.broadcast(found)
    if not isinstance(found, Teacher):
        raise found
    if section.store is not None:
        return found, Stored(TeacherStore(section.store, run.config, run.loader, found), found, run)
    return found, Reading(found, run, section.teacher)


def find_teacher(section: DistillConfig, run: Run) -> Teacher:
    """The teacher of the store, or of earlier starts in this run directory; otherwise what its path means now."""
    if section.store is not None:
        return Teacher.find(section.teacher, stored_teacher(section.store))
    kept = run.directory / TEACHER_FILE
    known = Teacher.from_json(kept) if kept.is_file() else None
    return Teacher.find(section.teacher, known if known and known.path == section.teacher else None)
