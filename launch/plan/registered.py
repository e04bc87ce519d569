"""Memory, FLOPs and state of a registered mixer, found by building one block of it without storage.

How it works: the planner knows no registered mixer by name. It builds one, runs it forward and notes through autograd's
hooks what is saved for backward; matrices and decode state are read from the module. So a plugin is planned like a
built-in mixer. With PyTorch's kernels the pass runs on fake tensors. With Triton's it runs on meta tensors, where
operations give what their fake functions say, forward and then backward, whose results are counted as they live; what a
backward operation allocates inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amfm.model.build import build_mixer
from amfm.model.config.mixer_options import LinearOptions
from amfm.model.config.pattern import mixer_name
from amfm.model.config.schema import ModelConfig
from amfm.model.mixers.interface import SequenceMixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups

# Tokens of the row whose pass is counted: several chunks and windows of the usual sizes.
COUNTED_TOKENS = 2048


@dataclass(frozen=True)
class RegisteredBlock:
    """Sizes of one registered mixer on one rank.

    `kept_bytes`: a token, saved for backward. `working_bytes`: a token, held beside it during backward. `matrices`: [out, in] of each. `sequence_flops`: a token, of the
    recurrence or attention in forward. `state_numbers`: a row, of its decode state, which is what passes between
    context ranks.
    """

    kept_bytes: float
    working_bytes: float
    matrices: tuple[tuple[int, int], ...]
    sequence_flops: float
    state_numbers: int


@lru_cache(maxsize=256)
def registered_block(
    config: ModelConfig, letter: str, dtype: torch.dtype, sequence_length: int, backend: str = "torch", tensor: int = 1
) -> RegisteredBlock:
    """Count one block of a registered mixer without allocating memory, its heads cut over `tensor` ranks.

    Cached: a search asks for the same few blocks again and again. Raises ValueError for a mixer with an operation that has no
    fake function.
    """
    config = with_cut_heads(config, tensor)
    # A run whose chunks or states Triton's kernels do not take has to ask for PyTorch's.
    backend = backend if takes_kernels(config, letter) else "torch"
    try:
        # Fake tensors and not meta ones for PyTorch's kernels: it chooses its attention by device.
        with torch.device("meta") if backend == "triton" else FakeTensorMode(), default_dtype(dtype):
            mixer = build_mixer(config.built_letters.index(letter), config, single_rank_groups(), backend)
            assert isinstance(mixer, SequenceMixer), f"{letter} is no registered mixer"
            # Whether a mixer rotates its heads stands in a buffer.
            mixer.reset_buffers()
            kept, working = _measure(mixer, config.hidden_size, dtype, backend)
            state = mixer.empty_state(1)
    except RuntimeError as error:
        if not lacks_fake(error):
            raise
        raise ValueError(
            f"model.pattern has the mixer {letter}, which cannot be planned: {error}; its operations need fake functions "
            "(`register_fake`), as those of kernels/ have"
        ) from error
    matrices = tuple(
        (weight.shape[-2], weight.numel() // weight.shape[-2]) for weight in mixer.parameters() if weight.dim() > 1
    )
    numbers = sum(tensor.numel() for tensor in state.values())
    flops = mixer.sequence_flops(sequence_length)
    return RegisteredBlock(kept / COUNTED_TOKENS, working / COUNTED_TOKENS, matrices, flops, numbers)


def lacks_fake(error: RuntimeError) -> bool:
    """Whether an error is of an operation without a fake function; torch says it in three ways."""
    known = isinstance(error, (UnsupportedOperatorException, NotImplementedError))
    return known or "no fake impl registered" in str(error)


def takes_kernels(config: ModelConfig, letter: str) -> bool:
    """Whether Triton's kernels take the chunks and states of a registered mixer, and of one that it wraps."""
    name = mixer_name(letter)
    options = None if name is None else getattr(config.mixers, name)
    inside = None if options is None else options.wraps()
    found = [options, None if inside is None else getattr(config.mixers, inside)]
    return all(
        each.scan_limits.takes_chunk(each.chunk_size) and each.scan_limits.takes_state(*each.state_shape())
        for each in found
        if isinstance(each, LinearOptions) and each.scan_limits is not None
    )


def with_cut_heads(config: ModelConfig, tensor: int) -> ModelConfig:
    """The model with as many heads in its registered mixers as one of `tensor` ranks has."""
    if tensor == 1:
        return config
    sections = {}
    for name, options in config.mixers:
        if options is not None:
            cut = {field: size // tensor for field, size in options.cut_evenly().get("tensor", {}).items()}
            cut |= {field: max(1, units // tensor) for field, units in options.cut_or_copied().items()}
            sections[name] = options.model_copy(update=cut)
    return config.model_copy(update={"mixers": config.mixers.model_copy(update=sections)})


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


def _measure(mixer: SequenceMixer, hidden_size: int, dtype: torch.dtype, backend: str) -> tuple[int, int]:
    """Bytes that a pass over one row saves for backward, and bytes that backward holds beside them.

    Weights and the input are left out, and gradients of weights, which are counted elsewhere. With PyTorch's kernels the
    second is taken to be gradients of all that was kept.
    """
    meta = PackMeta.one_document_a_row(1, COUNTED_TOKENS)
    if backend == "triton":
        with torch.device("cpu"):  # where documents begin is found from values
            halves_BT = (torch.arange(COUNTED_TOKENS) * 2 // COUNTED_TOKENS)[None]
            meta = PackMeta.from_document_ids(halves_BT).find_bounds()
        meta = meta.map_tensors(lambda tensor: tensor.to("meta"))
    x_BTD = torch.empty(1, COUNTED_TOKENS, hidden_size, dtype=dtype, requires_grad=True)
    known = {id_of(tensor) for tensor in [x_BTD, *mixer.parameters(), *mixer.buffers()]}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in known:
            # By storage: views of one buffer that are saved apart cost its memory once.
            kept[id_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y_BTD = mixer(x_BTD, meta).y_BTD
    size = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    if backend != "triton":
        return size, size
    for parameter in mixer.parameters():
        parameter.register_post_accumulate_grad_hook(_forget_gradient)
    gradient_BTD = torch.empty_like(y_BTD)
    with LiveBytes() as live:
        y_BTD.backward(gradient_BTD)
    return size, live.peak


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Inside its block, counts the bytes of new storages that live; `peak` is the most of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.held = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it gives that is no view of its arguments."""
        out = func(*args, **(kwargs or {}))
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or id_of(tensor) in given or id_of(tensor) in self.live:
                continue
            self.live[id_of(tensor)] = tensor.untyped_storage().nbytes()
            self.held += self.live[id_of(tensor)]
            weakref.finalize(tensor.untyped_storage(), self._free, id_of(tensor))
        self.peak = max(self.peak, self.held)
        return out

    def _free(self, key: int) -> None:
        self.held -= self.live.pop(key)


def id_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage, the same for all views of it."""
    return tensor.untyped_storage()._cdata
