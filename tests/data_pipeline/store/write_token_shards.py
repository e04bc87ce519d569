"""Write the files of `token_shards/` by the libraries themselves: `python write_token_shards.py FOLDER`.

With mosaicml-streaming 0.13.0 and litdata 0.2.76, in an environment of their own. DOCUMENTS are those of test_token_files.py.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

DOCUMENTS = [[5, 6, 7, 2], [9, 2], [11, 12, 13, 14, 15, 2]]


def write_mds(folder: Path) -> None:
    """The same ids in each encoding that integers have, with a column of text; then the shard compressed."""
    from streaming import MDSWriter

    columns = {"text": "str", "free": "ndarray", "typed": "ndarray:uint16", "fixed": "ndarray:int32:3", "old": "bytes"}
    for name, compression in (("plain", None), ("packed", "zstd")):
        with MDSWriter(out=str(folder / name), columns=columns, compression=compression) as writer:
            for ids in DOCUMENTS:
                writer.write(
                    {
                        "text": f"document é {ids[0]}",
                        "free": np.array(ids, np.int64),
                        "typed": np.array(ids, np.uint16),
                        "fixed": np.array([ids[0], 7, 2], np.int32),
                        "old": np.array(ids, np.int64).tobytes(),
                    }
                )
    shutil.copy(folder / "plain/shard.00000.mds", folder / "a.mds")
    shutil.copy(folder / "packed/shard.00000.mds.zstd", folder / "b.mds.zstd")


def write_litdata(folder: Path) -> None:
    """A chunk of items of one type, as TokensLoader reads them."""
    from litdata.streaming.cache import Cache
    from litdata.streaming.item_loader import TokensLoader

    cache = Cache(str(folder / "cache"), chunk_size=100, item_loader=TokensLoader(4))
    for number, ids in enumerate(DOCUMENTS):
        cache._add_item(number, np.array(ids, np.uint16))
    cache.done()
    cache.merge(1)
    for path in (folder / "cache").iterdir():
        if path.name == "index.json" or path.suffix == ".bin":
            shutil.copy(path, folder / path.name)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    write_mds(out)
    write_litdata(out)
