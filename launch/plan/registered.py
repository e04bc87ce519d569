"""Matrices, FLOPs and state of a registered mixer, read from one block of it that is built without storage.

The planner knows no registered mixer by name, so that a plugin is planned like a built-in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from amfm.model.build import build_mixer
from amfm.model.config.pattern import mixer_name
from amfm.model.config.schema import ModelConfig
from amfm.model.mixers.interface import SequenceMixer
from amfm.model.parallel.groups import single_rank_groups


@dataclass(frozen=True)
class RegisteredBlock:
    """Sizes of one registered mixer, uncut.

    `matrices`: [out, in] of each. `sequence_flops`: a token, of the recurrence or attention in forward. `state_numbers`: a
    row, of its decode state, which is what passes between context ranks.
    """

    matrices: tuple[tuple[int, int], ...]
    sequence_flops: float
    state_numbers: int


@lru_cache(maxsize=256)
def registered_block(config: ModelConfig, letter: str, sequence_length: int) -> RegisteredBlock:
    """Read one block of a registered mixer. Cached: a search asks for the same few again and again."""
    with torch.device("meta"):
        mixer = build_mixer(config.built_letters.index(letter), config, single_rank_groups(), "torch")
        assert isinstance(mixer, SequenceMixer), f"{letter} is no registered mixer"
        state = mixer.empty_state(1)
    matrices = tuple(
        (weight.shape[-2], weight.numel() // weight.shape[-2]) for weight in mixer.parameters() if weight.dim() > 1
    )
    numbers = sum(tensor.numel() for tensor in state.values())
    return RegisteredBlock(matrices, mixer.sequence_flops(sequence_length), numbers)


def is_registered(letter: str) -> bool:
    """Whether the letter stands for a registered mixer."""
    return mixer_name(letter) is not None
