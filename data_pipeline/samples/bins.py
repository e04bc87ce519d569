"""Best-fit bins of every part for one sequence length: computed once, kept next to the parts, found again by digest.

Bins never cross parts, so a part's bins depend only on the part and the sequence length and are named by its digest: adding a
source recomputes nothing, and a part that was rewritten is never read with bins of the old one. Counts of a whole
source have a separate file, because a start of training needs the number of rows and not the bins.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict

import numpy as np
from blake3 import blake3

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.samples.packing import Bins, fit_documents
from amfm.data_pipeline.store.manifest import Part, Split
from amfm.data_pipeline.store.store import TokenStore

MAX_LOADED = 64
DIGEST_BYTES = 16  # BLAKE3 of the content, at the end of each file


class BinIndex:
    """Bins of the parts of a store for rows of `capacity` tokens.

    Files in store/bins/CAPACITY are a cache: a pure function of the parts, each with a digest at its end, rewritten when
    missing or damaged, and not written at all when the store is read-only.
    """

    def __init__(self, store: TokenStore, capacity: int) -> None:
        self.store, self.capacity = store, capacity
        self._folder = store.path / "bins" / str(capacity)
        self._loaded: OrderedDict[str, Bins] = OrderedDict()

    def count(self, source: str, split: Split) -> list[int]:
        """Count the rows of each part of a source, in order; the first call for a store fits all its documents."""
        name = f"{source}-{split}-{self.store.source_identity(source, split)}.json"
        found = self._find(name)
        if found is not None:
            return [int(count) for count in json.loads(found)]
        counts = [self.load(part).num_bins for part in self.store.parts(source, split)]
        self._keep(name, json.dumps(counts).encode())
        return counts

    def load(self, part: Part) -> Bins:
        """Load the bins of a part, from memory (the 64 used last), from the file, or by fitting its documents."""
        if part.path in self._loaded:
            self._loaded.move_to_end(part.path)
            return self._loaded[part.path]
        name = f"{part.digest}.npz"
        found = self._find(name)
        if found is not None:
            with np.load(io.BytesIO(found), allow_pickle=False) as arrays:
                bins = Bins(arrays["first"], arrays["length"], arrays["bin_offsets"])
        else:
            bins = fit_documents(self.store.document_ends(part), self.capacity)
            content = io.BytesIO()
            np.savez(content, first=bins.first, length=bins.length, bin_offsets=bins.bin_offsets)
            self._keep(name, content.getvalue())
        self._loaded[part.path] = bins
        if len(self._loaded) > MAX_LOADED:
            self._loaded.popitem(last=False)
        return bins

    def _find(self, name: str) -> bytes | None:
        """Content of a file of the cache; None where it is absent or damaged, and then it is computed and rewritten."""
        try:
            held = (self._folder / name).read_bytes()
        except OSError:
            return None
        content, digest = held[:-DIGEST_BYTES], held[-DIGEST_BYTES:]
        return content if blake3(content).digest(DIGEST_BYTES) == digest else None

    def _keep(self, name: str, content: bytes) -> None:
        """Write a file of the cache, atomically: ranks that fit the same part at once write the same bytes."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file_atomically(self._folder / name, content + blake3(content).digest(DIGEST_BYTES))
        except OSError:
            return  # a read-only or full disk only costs computing the bins again in the next process
