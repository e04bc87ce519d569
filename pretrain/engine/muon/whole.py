"""One step of whole matrices by a rule: kinds of Muon and optimizers of packages.

Weights and gradients are sent to the owners of their matrices (exchange.py) in the dtype of the master weights, and new weights come back.
Tensor ranks that hold slices gather the matrix, and each computes all of it, alike. The rule's state is with the owner, so ZeRO
spreads it, and without ZeRO no rank keeps what another one owns.

Checkpoints hold the state among buffers, a tensor for each matrix and name: `optimizer/PARAMETER/NUMBER/NAME`, NUMBER counting the
matrices of the whole parameter. So a run moves between layouts whoever owns what.

Kinds of Muon that need a matrix whole, with its weights and a state of any shape: NorMuon and Hyperball.

Each is what an installed package's optimizer of matrices is too (`pretrain/config/optimizers.py`): a function of a batch of whole
matrices that returns their new weights. NorMuon (Li et al. 2025, arXiv 2510.05491, algorithm 1):

    M <- mu M + G;   O = orthogonalize(G + mu M);   v <- beta2 v + (1 - beta2) mean of O^2 by row;   U = O / (sqrt(v) + epsilon)
    W <- (1 - rate decay) W - rate s sqrt(elements) U / |U|

so rows that Newton-Schulz leaves small step as far as the others, and |step| is that of an update of root mean square s.

Hyperball (Wen et al. 2026, arXiv 2606.16899) keeps the Frobenius norm R = |W| and steps by a share of it, without decay:

    W <- R normalize(W - rate R normalize(U))

U is Muon's O, or AdamW's bias-corrected update. R is taken from the weights at each step, which is its first value but for
rounding and for what others change (QK-clip).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amfm.model.matrices import MatrixStack
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.pretrain.config.optimizers import MuonConfig, PackageMatrices
from amfm.pretrain.engine.adamw import OWNED
from amfm.pretrain.engine.muon.exchange import MatrixExchange, alike_batches, join
from amfm.pretrain.engine.muon.newton_schulz import gather_rows, orthogonalize, own_rows
from amfm.pretrain.engine.parts import Part

Update = Callable[[Tensor, Tensor, Mapping[str, Tensor], int, Mapping[str, Any], Any], Tensor]
EPSILON = 1e-10  # of NorMuon's division, as its authors have it


@dataclass(frozen=True)
class Rule:
    """How matrices are stepped whole: a function as packages give it, its options, and the shapes of its state; `name` in messages."""

    name: str
    update: Update
    options: Any
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class MuonOptions:
    """Muon's settings, the width of muP's base model where a model has one, and the dtype of Newton-Schulz: None for that of the master weights."""

    muon: MuonConfig
    base_width: int | None
    dtype: torch.dtype | None

    def size(self, rows: int, columns: int) -> float:
        """Factor of an orthogonalised update of root mean square 1 / sqrt(longer side)."""
        squared = max(rows, columns) if self.base_width is None else self.base_width * rows / columns
        return self.muon.update_rms * math.sqrt(squared)


def find_rule(settings: MuonConfig | PackageMatrices, base_width: int | None, dtype: torch.dtype | None) -> Rule:
    """The rule of these settings, which are not plain Muon's."""
    if isinstance(settings, PackageMatrices):
        name = f"optimizer.kind={settings.spec.name}"
        return Rule(name, settings.spec.load(), settings.options, settings.state_shapes)
    options = MuonOptions(settings, base_width, dtype)
    return Rule(f"optimizer.muon.rule={settings.rule}", RULES[settings.rule], options, settings.state_shapes)


def _muon_update(gradient_NRC: Tensor, momentum_NRC: Tensor, options: MuonOptions) -> Tensor:
    """Add the gradient to the momentum; Muon's orthogonalised update, a step of Nesterov's ahead."""
    muon = options.muon
    momentum_NRC.mul_(muon.momentum).add_(gradient_NRC)
    update_NRC = gradient_NRC.add(momentum_NRC, alpha=muon.momentum)
    rows, columns = update_NRC.shape[1:]
    found_NRC = orthogonalize(update_NRC.to(options.dtype or update_NRC.dtype), muon.rounds, shape=(rows, columns))
    return found_NRC.to(update_NRC.dtype)


def normuon(
    weight_NRC: Tensor,
    gradient_NRC: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    group: Mapping[str, Any],
    options: MuonOptions,
) -> Tensor:
    """Step by NorMuon."""
    update_NRC = _muon_update(gradient_NRC, state["momentum"], options)
    squares_NR = state["row_squares"]
    squares_NR.lerp_(update_NRC.square().mean(-1), 1 - group["betas"][1])
    update_NRC = _normalized(update_NRC / (squares_NR.sqrt() + EPSILON)[..., None])
    rows, columns = update_NRC.shape[1:]
    # An orthogonal update has the norm of its shorter side, so it is given `size` for each root of that.
    size = group["lr"] * options.size(rows, columns) * math.sqrt(min(rows, columns))
    return weight_NRC * (1 - group["lr"] * group["weight_decay"]) - size * update_NRC


def hyperball(
    weight_NRC: Tensor,
    gradient_NRC: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    group: Mapping[str, Any],
    options: MuonOptions,
) -> Tensor:
    """Step by Muon's direction on the sphere of the weights' norm."""
    return _on_sphere(weight_NRC, _muon_update(gradient_NRC, state["momentum"], options), group["lr"], step)


def adam_hyperball(
    weight_NRC: Tensor,
    gradient_NRC: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    group: Mapping[str, Any],
    options: MuonOptions,
) -> Tensor:
    """Step by AdamW's direction on the sphere of the weights' norm."""
    beta1, beta2 = group["betas"]
    first_NRC = state["exp_avg"].lerp_(gradient_NRC, 1 - beta1) / (1 - beta1**step)
    second_NRC = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient_NRC, gradient_NRC, value=1 - beta2)
    update_NRC = first_NRC / ((second_NRC / (1 - beta2**step)).sqrt() + group["eps"])
    return _on_sphere(weight_NRC, update_NRC, group["lr"], step)


def _on_sphere(weight_NRC: Tensor, update_NRC: Tensor, rate: float, step: int) -> Tensor:
    """Step by `rate` times the weights' norm in the direction of the update, and back to that norm."""
    norm_N11 = torch.linalg.matrix_norm(weight_NRC, keepdim=True)
    if step == 1 and not bool(norm_N11.all()):
        raise ValueError("a matrix begins as zeros, and its norm would stay 0; use rule muon or normuon")
    return norm_N11 * _normalized(weight_NRC - rate * norm_N11 * _normalized(update_NRC))


def _normalized(x_NRC: Tensor) -> Tensor:
    """Matrices of Frobenius norm 1; zeros stay zeros."""
    norm_N11 = torch.linalg.matrix_norm(x_NRC, keepdim=True)
    return x_NRC / torch.where(norm_N11 == 0, 1.0, norm_N11)


RULES: dict[str, Update] = {"normuon": normuon, "hyperball": hyperball, "adam_hyperball": adam_hyperball}


@dataclass(frozen=True)
class Batch:
    """Stacks that are alike, with their places among the owned numbers, and their state by name, [N, *shape]."""

    members: list[tuple[MatrixStack, int]]
    state: dict[str, Tensor]


class WholeStep:
    """One step of the tensors that are handed over together, by a rule."""

    def __init__(
        self, parts: list[Part], stacks: Sequence[MatrixStack], groups: ProcessGroupCollection, rule: Rule
    ) -> None:
        self.parts, self.groups, self.rule = parts, groups, rule
        self.exchange = MatrixExchange(parts, stacks)
        master = parts[0].master
        self.batches: list[Batch] = []
        for members in alike_batches(self.exchange):
            count = sum(stack.count for stack, _ in members)
            shapes = rule.shapes(*members[0][0].shape)
            state = {name: master.new_zeros(count, *shape) for name, shape in shapes.items()}
            self.batches.append(Batch(members, state))

    def owned_states(self) -> dict[str, Tensor]:
        """The state of this rank's matrices, by the name that it has in checkpoints; views."""
        found: dict[str, Tensor] = {}
        for batch in self.batches:
            numbers = [(stack.name, stack.first + n) for stack, _ in batch.members for n in range(stack.count)]
            for name, values in batch.state.items():
                found |= {
                    f"{OWNED}{parameter}/{number}/{name}": own for (parameter, number), own in zip(numbers, values)
                }
        return found

    def run(self, states: dict[Tensor, dict[str, Tensor]], group: dict[str, Any]) -> None:
        """Update state and master weights in place. Every data rank, and every rank of the cuts, must call this."""
        masters = [part.master for part in self.parts]
        for master in masters:
            state = states[master]
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
            state["step"] += 1
        step = int(states[masters[0]]["step"])
        gradients = [torch.zeros_like(master) if master.grad is None else master.grad for master in masters]
        weights = join([master.detach().flatten() for master in masters], masters[0])
        owned = self.exchange.to_owners(weights)
        owned_gradients = self.exchange.to_owners(join([gradient.flatten() for gradient in gradients], masters[0]))
        for batch in self.batches:
            self._step(batch, owned, owned_gradients, step, group)
        self.exchange.to_ranges(owned, weights)
        for master, values in zip(masters, weights.split([master.numel() for master in masters])):
            master.copy_(values.view_as(master))

    def _step(self, batch: Batch, owned: Tensor, gradients: Tensor, step: int, group: dict[str, Any]) -> None:
        """Replace the weights of a batch, flat among the owned numbers, by what the rule makes of them."""
        stack, rule = batch.members[0][0], self.rule
        weight_NRC, gradient_NRC = (self._whole(flat, batch) for flat in (owned, gradients))
        try:
            new_NRC = rule.update(weight_NRC, gradient_NRC, batch.state, step, group, rule.options)
        except ValueError as error:
            raise ValueError(f"{rule.name}: {stack.name} and those like it: {error}") from error
        if not isinstance(new_NRC, Tensor) or new_NRC.shape != weight_NRC.shape:
            found = list(new_NRC.shape) if isinstance(new_NRC, Tensor) else type(new_NRC).__name__
            raise ValueError(
                f"{rule.name}: its update returned {found} for {len(weight_NRC)} matrices of {stack.name} and those like it; "
                f"it must return new weights of shape {list(weight_NRC.shape)}"
            )
        if stack.cut is not None:
            cut_group = getattr(self.groups, stack.cut.axis)
            is_by_column = stack.cut.dim == 1
            rows_NRC = own_rows(new_NRC.mT if is_by_column else new_NRC, stack.cut, cut_group)
            new_NRC = rows_NRC.mT if is_by_column else rows_NRC
        places = [owned[place : place + each.numel] for each, place in batch.members]
        shaped = [place.view(stack.count, stack.rows, stack.columns) for place in places]
        torch._foreach_copy_(shaped, list(new_NRC.split(stack.count)))

    def _whole(self, flat: Tensor, batch: Batch) -> Tensor:
        """The matrices of a batch, [N, R, C], gathered from the ranks of their cut."""
        stack = batch.members[0][0]
        pieces = [flat[place : place + each.numel] for each, place in batch.members]
        held_NRC = join(pieces, flat).view(-1, stack.rows, stack.columns)
        if stack.cut is None:
            return held_NRC
        cut_group = getattr(self.groups, stack.cut.axis)
        if stack.cut.dim == 1:
            return gather_rows(held_NRC.mT, stack.cut, cut_group).mT
        return gather_rows(held_NRC, stack.cut, cut_group)


def make_steps(
    parts: Sequence[list[Part]],
    stacks: Sequence[MatrixStack],
    groups: ProcessGroupCollection,
    settings: MuonConfig | PackageMatrices,
    base_width: int | None,
    dtype: torch.dtype | None,
) -> list[WholeStep]:
    """The steps of parts that are handed over together, by the rule of these settings."""
    rule = find_rule(settings, base_width, dtype)
    return [WholeStep(members, stacks, groups, rule) for members in parts]
