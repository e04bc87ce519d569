"""The six colours of series stay apart for readers who see fewer of them."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from amfm.pretrain.report.numbers import DARK, LIGHT, Colours

Vector = npt.NDArray[np.float64]
# Machado, Oliveira, Fernandes (2009), severity 1, of linear RGB.
SEEN = {
    "all": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)


def to_lab(rgb: Vector) -> Vector:
    """CIELAB of linear RGB, of the white of D65."""
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def to_linear(colour: str) -> Vector:
    share = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("sight", SEEN)
@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_any_two_colours_of_series_are_at_least_15_apart(colours: Colours, sight: str) -> None:
    seen = [to_lab(np.asarray(SEEN[sight]) @ to_linear(colour)) for colour in colours.series]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 15
