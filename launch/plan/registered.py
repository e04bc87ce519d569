"""Memory, FLOPs and state of a registered mixer, found by building one block of it on fake tensors.

How it works: the planner knows no registered mixer by name. It builds one, runs a forward pass on fake tensors (shapes
and dtypes without storage) and notes through autograd's hooks what is saved for backward; matrices and decode state are
read from the module. So a plugin is planned like a built-in mixer. The pass takes the PyTorch path; Triton kernels save
less, so the estimate errs on the safe side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.build import build_mixer
from model.config.pattern import mixer_name
from model.config.schema import ModelConfig
from model.mixers.interface import SequenceMixer
from model.packing import PackMeta
from model.parallel.groups import single_rank_groups

# Tokens of the row whose pass is counted: several chunks and windows of the usual sizes.
COUNTED_TOKENS = 2048


@dataclass(frozen=True)
class RegisteredBlock:
    """Sizes of one registered mixer on one rank, before any cut over tensor ranks.

    `kept_bytes`: a token, saved for backward. `matrices`: [out, in] of each. `sequence_flops`: a token, of the
    recurrence or attention in forward. `state_numbers`: a row, of its decode state, which is what passes between
    context ranks.
    """

    kept_bytes: float
    matrices: tuple[tuple[int, int], ...]
    sequence_flops: float
    state_numbers: int


@lru_cache(maxsize=128)
def registered_block(config: ModelConfig, letter: str, dtype: torch.dtype, sequence_length: int) -> RegisteredBlock:
    """Count one block of a registered mixer without allocating memory.

    Cached: a search asks for the same few blocks again and again.
    """
    # Fake tensors and not meta ones: PyTorch chooses its attention by device. They cannot be cast afterwards.
    with FakeTensorMode(), default_dtype(dtype):
        mixer = build_mixer(config.built_letters.index(letter), config, single_rank_groups(), "torch")
        assert isinstance(mixer, SequenceMixer), f"{letter} is no registered mixer"
        # Whether a mixer rotates its heads stands in a buffer.
        mixer.reset_buffers()
        kept = _kept_bytes(mixer, config.hidden_size, dtype) / COUNTED_TOKENS
        state = mixer.empty_state(1)
    matrices = tuple(
        (weight.shape[-2], weight.numel() // weight.shape[-2]) for weight in mixer.parameters() if weight.dim() > 1
    )
    numbers = sum(tensor.numel() for tensor in state.values())
    return RegisteredBlock(kept, matrices, mixer.sequence_flops(sequence_length), numbers)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new parameters in this dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def is_registered(letter: str) -> bool:
    """Whether the letter stands for a registered mixer."""
    return mixer_name(letter) is not None


def _kept_bytes(mixer: SequenceMixer, hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of the storages that a pass over one row saves for backward, weights and the input left out."""
    x_BTD = torch.empty(1, COUNTED_TOKENS, hidden_size, dtype=dtype, requires_grad=True)
    known = {id_of(tensor) for tensor in [x_BTD, *mixer.parameters(), *mixer.buffers()]}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in known:
            # By storage: views of one buffer that are saved apart cost its memory once.
            kept[id_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = mixer(x_BTD, PackMeta.one_document_a_row(1, COUNTED_TOKENS))
    del output
    return sum(storage.nbytes() for storage in kept.values())


def id_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage, the same for all views of it."""
    return tensor.untyped_storage()._cdata
