"""Derived sizes are arithmetic on settings, and nothing else."""

from __future__ import annotations

import pytest
from amfm_study.expressions import evaluate


def value_of(name: str) -> object:
    return {"hidden_size": 96, "model.moe.top_k": 2, "optimizer.learning_rate": 3e-4, "kind": "muon"}[name]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hidden_size // 16", 6),
        ("4 * hidden_size * model.moe.top_k", 768),
        ("max(1, hidden_size // 128)", 1),
        ("round(hidden_size * 8 / 3 / 8) * 8", 256),
        ("optimizer.learning_rate * (96 / hidden_size) ** 0.5", 3e-4),
        ("-2 + 5 % 3", 0),
    ],
)
def test_arithmetic_of_settings_has_its_value(text: str, value: float) -> None:
    found = evaluate(text, value_of)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "has more than a size needs"),
        ("().__class__", "has more than a size needs"),
        ("[1 for x in hidden_size]", "has more than a size needs"),
        ("kind * 2", "reads kind, which is 'muon' and no number"),
        ("hidden_size // 0", "has no value"),
        ("9 ** 9 ** 9", "use at most 64"),
        ("9 ** 64 ** 1 * 2", "passes 1e"),
        ("(-8) ** 0.5", "passes 1e"),
        ("hidden_size +", "is not an expression"),
        ("1" * 201, "use at most 200"),
        ("round(hidden_size, ndigits=2)", "has more than a size needs"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(text, value_of)
