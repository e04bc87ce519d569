"""Distillation: a teacher reads each micro-batch before the model, and the loss moves to its probabilities (docs/distillation.md).

The teacher is a second model without gradients and optimizer, cut over tensor and expert ranks as the model is; every data
rank has a copy. Its head and the model's are compared a slice of tokens at a time (model/divergence.py). Nothing is saved: what
the teacher says is a function of its files and the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amfm.model.divergence import Divergence, HeadRows, divergence_at_head
from amfm.model.hybrid import HybridModel
from amfm.model.loss import IGNORE_INDEX
from amfm.model.packing import PackMeta
from amfm.pretrain.config.hook_sections import DistillConfig
from amfm.pretrain.hook import Hook
from amfm.pretrain.inference.weights import Weights, read_weights
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.monitor.metrics import finite
from amfm.pretrain.run import Run
from amfm.pretrain.step_sums import StepResult

LOSS = "distill"


def read_teacher(path: str) -> Weights:
    """Read a checkpoint, run or weights folder, or a folder of a class of transformers that we read; without MTP layers."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        from amfm.pretrain.export.import_huggingface import read_huggingface

        return read_huggingface(folder)[0].without_depths()
    return read_weights(folder).without_depths()


def require_same_tokens(teacher: Weights, run: Run, path: str) -> None:
    """Reject a teacher whose probabilities are of other tokens: ValueError says what differs."""
    found, here = teacher.tokenizer_identity(), run.identities["tokenizer"]
    if found != here:
        raise ValueError(
            f"distill.teacher={path} was trained with tokenizer {found}, and the data of this run is of {here}; tokens mean other "
            "things there: prepare the data with the teacher's tokenizer, or give another teacher"
        )
    if teacher.model.vocab_size != run.config.model.vocab_size:
        raise ValueError(
            f"distill.teacher={path} has vocab_size {teacher.model.vocab_size}, and model.vocab_size={run.config.model.vocab_size}; "
            "probabilities are compared token by token: use the teacher's number"
        )
    if teacher.model.head is not None or teacher.model.lora_mixer is not None:
        raise ValueError(
            f"distill.teacher={path} has a head of a package or updates that a router chooses among; give another teacher"
        )


class Distill(Hook):
    """Adds weight times the divergence less the cross entropy to the loss, as the auxiliary loss `distill`."""

    def __init__(self, section: DistillConfig, run: Run) -> None:
        self.section, self.run = section, run
        self.divergence = Divergence(section.kind, section.temperature, section.top_k)
        weights = read_teacher(section.teacher)
        require_same_tokens(weights, run, section.teacher)
        self.origin = weights.origin
        model, dtype = run.model, torch.bfloat16 if run.config.train.precision == "bf16" else torch.float32
        self.teacher = weights.build(
            backend=model.backend, device=run.parallel.device, groups=run.parallel.groups, dtype=dtype
        ).requires_grad_(False)
        self.share: LossShare | None = None
        self.read_BTD: Tensor | None = None
        self.sums = torch.zeros(2, dtype=torch.float64, device=run.parallel.device)
        model.losses_at_head.append(self.compare)
        self.handle = model.register_forward_pre_hook(self.ask)

    def at_start(self) -> None:
        """Report whose probabilities are learnt."""
        self.run.tell(
            "distill",
            f"distilling from {self.origin}: {self.teacher.config.pattern}, "
            f"{sum(each.numel() for each in self.teacher.parameters()):,} parameters on this rank",
            teacher=self.origin,
        )

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Learn how the step's losses are divided; passes that are taken again start over."""
        self.share = share
        self.sums.zero_()

    @torch.no_grad()
    def ask(self, model: nn.Module, given: tuple[Any, ...]) -> None:
        """Let the teacher read the tokens that the model is about to read."""
        if not model.training:
            return
        tokens_BT, meta = given[0], given[1]
        assert isinstance(meta, PackMeta), "training passes have the layout of their rows"
        teacher: HybridModel = self.teacher
        stream = teacher.pass_blocks(teacher.embed(tokens_BT), teacher.blocks.indices(), meta)
        self.read_BTD = teacher.read_head(stream)

    def compare(self, read_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> Mapping[str, Tensor]:
        """The loss that the model adds to its auxiliary ones; these are divided by the micro-batches of the step."""
        assert self.share is not None and self.read_BTD is not None, "a pass of training comes after the teacher's"
        teacher = HeadRows(self.read_BTD.flatten(0, 1), self.teacher.head_weight())
        self.read_BTD = None
        student = HeadRows(read_BTD.flatten(0, 1), weight_VD)
        total, alone = divergence_at_head(
            student, teacher, labels_BT.flatten(), self.divergence, self.run.parallel.groups
        )
        self.sums += torch.stack([alone.double(), (labels_BT != IGNORE_INDEX).sum().double()])
        factor = self.section.weight * self.share.num_micro_batches / self.share.valid_tokens
        return {LOSS: total * factor}

    def after_step(self, result: StepResult) -> None:
        """Report the mean divergence a token."""
        divergence, tokens = self.run.parallel.all_reduce_unique(self.sums.clone()).tolist()
        result.found["divergence"] = finite(divergence / max(1.0, tokens))

    def close(self) -> None:
        """Let go of the model."""
        self.handle.remove()
        self.run.model.losses_at_head.remove(self.compare)
