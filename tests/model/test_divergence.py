"""The loss of distillation against its formula in float64, with gradients, by slices and by ranks of the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model import divergence as module
from amfm.model.divergence import Divergence, HeadRows, divergence_at_head
from amfm.model.parallel.groups import single_rank_groups

ROWS, WIDTH, VOCAB = 23, 7, 31
FORMS = [
    Divergence("kl", 1.0, None),
    Divergence("kl", 2.5, None),
    Divergence("reverse_kl", 1.7, None),
    Divergence("kl", 1.0, 5),
    Divergence("reverse_kl", 0.6, 3),
]


def drawn(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"read": (ROWS, WIDTH), "weight": (VOCAB, WIDTH), "teacher": (ROWS, WIDTH + 2), "their": (VOCAB, WIDTH + 2)}
    found = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()
    }
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    labels[::4] = -100
    return found | {"labels": labels}


def by_formula(given: dict[str, Tensor], form: Divergence) -> tuple[Tensor, Tensor]:
    """Sums over outcomes, token by token: the chosen tokens, and all others as one."""
    total = alone = torch.zeros((), dtype=torch.float64)
    for row, label in enumerate(given["labels"].tolist()):
        if label == -100:
            continue
        logits, theirs = given["weight"] @ given["read"][row], given["their"] @ given["teacher"][row]
        q, p = (torch.softmax(each / form.temperature, 0) for each in (logits, theirs))
        if form.top_k is not None:
            chosen = theirs.topk(form.top_k).indices
            q, p = (torch.cat([each[chosen], (1 - each[chosen].sum())[None]]) for each in (q, p))
        if form.kind == "reverse_kl":
            q, p = p, q
        found = form.temperature**2 * (p * (p.log() - q.log())).sum()
        total, alone = total + found + torch.log_softmax(logits, 0)[label], alone + found
    return total, alone


def computed(given: dict[str, Tensor], form: Divergence) -> tuple[Tensor, Tensor]:
    student, teacher = HeadRows(given["read"], given["weight"]), HeadRows(given["teacher"], given["their"])
    return divergence_at_head(student, teacher, given["labels"], form, single_rank_groups())


def gradients(function: Any, given: dict[str, Tensor], form: Divergence) -> list[Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in ("read", "weight")}
    total, alone = function(given | leaves, form)
    found = torch.autograd.grad(0.7 * total, list(leaves.values()))
    return [total.detach(), alone.detach(), *found]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_loss_and_its_gradients_are_the_formulas(form: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE", 4 * VOCAB)  # several slices, the last one short
    wanted = gradients(by_formula, drawn(torch.float64), form)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 6e-2)):
        given = drawn(dtype)
        found = gradients(computed, given, form)
        expected = (
            wanted
            if dtype != torch.bfloat16
            else gradients(
                by_formula,
                {name: each.double() if each.is_floating_point() else each for name, each in given.items()},
                form,
            )
        )
        for each, other in zip(found, expected, strict=True):
            assert (each.double() - other).norm() <= tolerance * other.norm(), (dtype, form)


def test_of_a_teacher_that_is_the_model_there_is_nothing_to_learn() -> None:
    given = drawn(torch.float64)
    same = given | {"teacher": given["read"], "their": given["weight"]}
    for form in FORMS:
        assert abs(float(computed(same, form)[1])) < 1e-12


def test_fewer_outcomes_are_never_further_apart() -> None:
    """So what is left out is not made up: the divergence of k tokens and the rest is a lower bound of the whole one."""
    given = drawn(torch.float64)
    found = [float(computed(given, Divergence("kl", 1.0, top_k))[1]) for top_k in (1, 4, 12, VOCAB - 1, None)]
    assert found == sorted(found) and found[0] < 0.9 * found[-1] and found[-2] == pytest.approx(found[-1], rel=1e-9)
