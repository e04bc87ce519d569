"""Readers side by side: ours, megatron-core's GPTDataset, MosaicML streaming, a numpy memmap and zarr-python.

How it works: a reader is a function from a sample number to `batch` complete samples (int64 tokens and labels [T], a
bool or float loss mask and positions), built over the same text. Formats without documents get plain windows, so that
they do the least work that training could need. Ours and one of GPTDataset's settings also keep documents apart; only
ours verifies a checksum of what it reads. Each reader states its bytes per token on disk, because compression is paid for
in time.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.samples.samples import SampleReader
from amfm.data_pipeline.store.store import TokenStore
from benchmarks.data.files import SOURCE, BenchData, bytes_below, megatron_cache, windows

Tokens = npt.NDArray[np.generic]
Sample = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Reader:
    """read: gives `BenchData.batch` samples from a sample number on, in its own shuffled order.

    Peers that give single samples drop each before they read the next, the cheapest that can be done with them: memory
    that comes back at once stays in the cache. Ours gives whole micro-batches.

    documents: whether labels, positions and masks keep documents apart. checksum: whether what is read is verified.
    """

    name: str
    preset: str
    bytes_per_token: float
    documents: bool
    checksum: bool
    read: Callable[[int], Iterator[Any]]


def our_reader(settings: BenchData, store: TokenStore) -> Reader:
    """Our training loader without workers, giving whole micro-batches."""
    loader = PretrainLoader(
        settings.data_config(Path(store.path).name),
        sequence_length=settings.sequence_length,
        micro_batch_size=settings.batch,
        seed=1,
    )

    def read(first: int) -> Iterator[object]:
        loader.seek(first)
        yield from loader.take(settings.batch)

    size = bytes_below(store.path / "parts") / store.num_tokens(SOURCE, "train")
    return Reader("amfm", store.layout.preset, size, True, True, read)


def megatron_readers(settings: BenchData, store: TokenStore, prefix: Path, num_bytes: int) -> list[Reader]:
    """GPTDataset three times: as it comes, with its samples collated into a batch, and with documents kept apart."""
    plain, apart = (_gpt_dataset(settings, store, prefix, documents=documents) for documents in (False, True))
    batch, size = settings.batch, num_bytes / store.num_tokens(SOURCE, "train")

    def samples(dataset: Any) -> Callable[[int], Iterator[Sample]]:
        return lambda first: (dataset[(first + number) % len(dataset)] for number in range(batch))

    def collated(first: int) -> Iterator[object]:
        yield torch.utils.data.default_collate(list(samples(plain)(first)))

    return [
        Reader("megatron_gpt_dataset", "", size, False, False, samples(plain)),
        Reader("megatron_gpt_dataset_collated", "", size, False, False, collated),
        Reader("megatron_gpt_dataset_documents", "", size, True, False, samples(apart)),
    ]


def _gpt_dataset(settings: BenchData, store: TokenStore, prefix: Path, *, documents: bool) -> Any:
    """megatron-core's GPTDataset over PREFIX.bin, all documents in its training split.

    `documents`: positions restart at each document and end-of-document tokens are masked from the loss. Attention masks
    of [T, T] are not built in either case.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=settings.sequence_length,
        blend=([str(prefix)], None),
        split="100,0,0",
        path_to_cache=str(megatron_cache(prefix)),
        tokenizer=_MegatronTokenizer(store),
        reset_position_ids=documents,
        reset_attention_mask=False,
        eod_mask_loss=documents,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(prefix), mmap=True)
    sequences = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    samples = max(1, (store.num_tokens(SOURCE, "train") - 1) // settings.sequence_length)
    return GPTDataset(indexed, str(prefix), sequences, samples, Split.train, config)


class _MegatronTokenizer:
    """The attributes that GPTDataset asks of a tokenizer."""

    def __init__(self, store: TokenStore) -> None:
        self.unique_identifiers = {"identity": store.tokenizer_identity}
        self.vocab_size, self.eod = store.vocab_size, store.eos_id
        self.pad = store.vocab_size  # an id that never occurs: rows here have no padding


def streaming_reader(settings: BenchData, store: TokenStore, folder: Path) -> Reader | None:
    """MosaicML streaming over local uncompressed shards; None where it is not installed.

    Its samples are read in a shuffled order made here, as its own shuffle would be another one.
    """
    if importlib.util.find_spec("streaming") is None:
        return None
    from streaming import MDSWriter, StreamingDataset

    length = settings.sequence_length
    shutil.rmtree(folder, ignore_errors=True)
    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:{store.layout.dtype}:{length + 1}"}) as writer:
        for window in windows(store, length):
            writer.write({"tokens": window})
    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=settings.batch)
    # Shuffled here rather than by the library, so that all peers read windows at random.
    order = np.random.default_rng(1).permutation(len(dataset))
    size = bytes_below(folder) / (len(dataset) * length)
    return _window_reader(
        "mosaicml_streaming",
        "",
        size,
        False,
        settings,
        len(order),
        lambda number: dataset[int(order[number])]["tokens"],
    )


def memmap_reader(settings: BenchData, store: TokenStore, file: Path) -> Reader:
    """A flat token file, memory-mapped, read in a shuffled order of windows: the least that any reader does."""
    tokens = np.memmap(file, dtype=store.layout.dtype, mode="r")
    length = settings.sequence_length
    order = np.random.default_rng(1).permutation((len(tokens) - 1) // length).tolist()
    item = np.dtype(store.layout.dtype).itemsize
    return _window_reader(
        "numpy_memmap",
        "",
        item,
        False,
        settings,
        len(order),
        lambda number: tokens[order[number] * length : (order[number] + 1) * length + 1],
    )


def zarr_reader(settings: BenchData, store: TokenStore) -> Reader:
    """zarr-python over our own parts: the windows that our loader reads, in its order.

    It shows what the store's own reader gains over the library whose format it shares.
    """
    import zarr

    loader = PretrainLoader(
        settings.data_config(Path(store.path).name),
        sequence_length=settings.sequence_length,
        micro_batch_size=settings.batch,
        seed=1,
    )
    reader, arrays = loader.reader, dict[str, Any]()
    assert isinstance(reader, SampleReader), "the configuration is of text"

    def window(number: int) -> Tokens:
        place = reader.locate(np.array([number]))[0]
        if place.part.path not in arrays:
            arrays[place.part.path] = zarr.open_group(str(store.path / place.part.path), mode="r")["tokens"]
        first = place.row * settings.sequence_length
        found: Tokens = arrays[place.part.path][first : first + settings.sequence_length + 1]
        return found

    size = bytes_below(store.path / "parts") / store.num_tokens(SOURCE, "train")
    return _window_reader("zarr_python", store.layout.preset, size, True, settings, 2**62, window)


def _window_reader(
    name: str,
    preset: str,
    bytes_per_token: float,
    checksum: bool,
    settings: BenchData,
    count: int,
    window: Callable[[int], Tokens],
) -> Reader:
    """Reader that makes complete samples without documents from windows of tokens."""
    positions = torch.arange(settings.sequence_length)

    def sample(number: int) -> Sample:
        tokens = torch.from_numpy(window(number % count).astype(np.int64))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(settings.sequence_length, dtype=torch.bool),
            "position_ids": positions,
        }

    def read(first: int) -> Iterator[object]:
        return (sample(first + number) for number in range(settings.batch))

    return Reader(name, preset, bytes_per_token, False, checksum, read)
