"""A plain loop that trains a model of transformers: what a run of ours must equal. It uses only PyTorch.

Written from the equations on docs/replica.md, without code of amfm: each document passes the model on its own, losses of a step
are summed in the order in which they come, and the optimizer is torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a label that no loss counts


@dataclass(frozen=True)
class Document:
    """Tokens, and the token that follows each within the document; where none does, `IGNORED`."""

    tokens: list[int]
    labels: list[int]


Row = Sequence[Document]
MicroBatch = Sequence[Row]
Step = Sequence[MicroBatch]


@dataclass(frozen=True)
class Recipe:
    """Settings of a run: rate, its warm-up and linear decay in steps, AdamW, clipping, and what balances the router.

    balance, sequence, z: weights of router losses. bias_rate: step of the balancing bias, 0 without one.
    """

    steps: int = 50
    rate: float = 3e-3
    warmup: int = 5
    decay: int = 20
    min_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 0.5
    balance: float = 0.0
    sequence: float = 0.0
    z: float = 0.0
    bias_rate: float = 0.0


@dataclass
class PlainStep:
    """Loss and gradient norm of a step, choices by router and expert, and the smallest margin by which one was made."""

    loss: float
    norm: float
    counts: list[list[int]]
    margin: float


@dataclass
class Router:
    """A router of the model, and what it was given and chose since `clear`. kind: softmax or sigmoid."""

    module: Any
    bias: Tensor | None
    kind: str
    top_k: int
    num_groups: int
    group_top_k: int
    inputs: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.module.register_forward_hook(self.note)

    def note(self, _: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the rows [T, D] that came, and the experts [T, K] that were chosen."""
        self.inputs.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
        self.chosen.append(output[2])

    def clear(self) -> None:
        """Forget all."""
        self.inputs.clear()
        self.chosen.clear()

    def logits(self) -> list[Tensor]:
        """Logits [T, E] of each document."""
        return [F.linear(rows, self.module.weight, getattr(self.module, "bias", None)) for rows in self.inputs]

    def shares(self, logits: Tensor) -> Tensor:
        """Scores that add up to 1 for a token."""
        if self.kind == "softmax":
            return logits.softmax(-1)
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def margin(self, logits: Tensor) -> float:
        """The smallest difference between an expert, or a group, that was chosen and one that was not."""
        merit = logits if self.kind == "softmax" else logits.sigmoid()
        merit = merit.detach() if self.bias is None else merit.detach() + self.bias
        margins = []
        if self.group_top_k < self.num_groups:
            groups = merit.unflatten(-1, (self.num_groups, -1)).topk(2, dim=-1).values.sum(-1)
            best = groups.sort(-1, descending=True)
            margins.append(best.values[:, self.group_top_k - 1] - best.values[:, self.group_top_k])
            is_open = torch.zeros_like(groups, dtype=torch.bool)
            is_open.scatter_(1, best.indices[:, : self.group_top_k], True)
            size = merit.shape[-1] // self.num_groups
            merit = merit.masked_fill(~is_open.repeat_interleave(size, dim=-1), float("-inf"))
        best_values = merit.sort(-1, descending=True).values
        margins.append(best_values[:, self.top_k - 1] - best_values[:, self.top_k])
        return min(float(each.min()) for each in margins)


def find_routers(model: nn.Module, config: Any) -> list[Router]:
    """All routers of a model, first block first."""
    routers = []
    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            parent = model.get_submodule(name.rpartition(".")[0])
            bias = getattr(module, "e_score_correction_bias", getattr(parent, "expert_bias", None))
            kind = "softmax" if bias is None else "sigmoid"
            groups = getattr(module, "num_group", 1), getattr(module, "topk_group", 1)
            routers.append(Router(module, bias, kind, module.top_k, *groups))
    return routers


def learning_rate(step: int, recipe: Recipe) -> float:
    """Of step 1, 2, ...: a linear rise to the peak, the peak, and a linear fall to its last share at the last step."""
    if step <= recipe.warmup:
        return recipe.rate * step / recipe.warmup
    fallen = max(0, step - (recipe.steps - recipe.decay)) / recipe.decay
    return recipe.rate * (1 - (1 - recipe.min_ratio) * fallen)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices, embedding, head and convolutions, but no norms, biases and other vectors."""
    decaying, others = [], []
    for name, parameter in model.named_parameters():
        # Biases of the first product of gpt-oss's experts are columns of its matrix in amfm, and decay with it.
        is_bias = name.endswith("bias") and not name.endswith("experts.gate_up_proj_bias")
        is_matrix = parameter.dim() >= 2 and not is_bias
        (decaying if is_matrix else others).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=recipe.betas, eps=recipe.epsilon)


def router_losses(router: Router, recipe: Recipe, num_documents: Sequence[int]) -> Iterator[Tensor]:
    """The weighted losses of one router over a micro-batch whose rows have so many documents.

    balance: experts x sum over experts of (share of choices that only scores make) x (mean share of scores), over all
    tokens; sequence: the same in each row, then the mean over rows; z: mean of the squared log-sum-exp of logits.
    """
    logits = router.logits()
    rows, at = [], 0
    for number in num_documents:
        rows.append(torch.cat(logits[at : at + number]))
        at += number

    def balance(logits_TE: Tensor) -> Tensor:
        shares_TE = router.shares(logits_TE)
        is_best_TE = torch.zeros_like(shares_TE).scatter_(1, shares_TE.topk(router.top_k, dim=-1).indices, 1.0)
        return shares_TE.shape[1] * (is_best_TE.mean(0) / router.top_k * shares_TE.mean(0)).sum()

    if recipe.balance:
        yield recipe.balance * balance(torch.cat(rows))
    if recipe.sequence:
        yield recipe.sequence * torch.stack([balance(row) for row in rows]).mean()
    if recipe.z:
        yield recipe.z * torch.cat(rows).logsumexp(-1).square().mean()


def backward(model: Any, routers: Sequence[Router], step: Step, recipe: Recipe) -> tuple[float, list[Tensor], float]:
    """Add the gradients of a step to the weights: its loss, choices by router and expert, and their smallest margin.

    The loss is the mean over the labels of the step, without router losses.
    """
    num_labels = sum(
        label != IGNORED for batch in step for row in batch for document in row for label in document.labels
    )
    total, margin = 0.0, float("inf")
    counts = [torch.zeros(len(router.module.weight), dtype=torch.int64) for router in routers]
    for batch in step:
        for router in routers:
            router.clear()
        losses: list[Tensor] = []
        for row in batch:
            for document in row:
                logits = model(input_ids=torch.tensor([document.tokens]), use_cache=False).logits[0]
                labels = torch.tensor(document.labels)
                losses.append(F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum"))
        loss = torch.stack(losses).sum()
        total += float(loss.detach().double())
        whole = loss / num_labels
        for router, count in zip(routers, counts, strict=True):
            count += torch.cat(router.chosen).flatten().bincount(minlength=len(count))
            margin = min(margin, *(router.margin(logits) for logits in router.logits()))
            for each in router_losses(router, recipe, [len(row) for row in batch]):
                whole = whole + each / len(step)
        whole.backward()
    return total / num_labels, counts, margin


def train_plainly(model: Any, steps: Sequence[Step], recipe: Recipe) -> list[PlainStep]:
    """Train, and return what each step gave."""
    model.train()
    routers = find_routers(model, model.config)
    optimizer = make_optimizer(model, recipe)
    found = []
    for number, step in enumerate(steps, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, recipe)
        loss, counts, margin = backward(model, routers, step, recipe)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), recipe.clip))
        optimizer.step()
        optimizer.zero_grad()
        for router, count in zip(routers, counts, strict=True):
            if router.bias is not None and recipe.bias_rate:
                router.bias += recipe.bias_rate * torch.sign(count.double().mean() - count)
                router.bias -= router.bias.mean()
        found.append(PlainStep(loss, norm, [count.tolist() for count in counts], margin))
    return found
