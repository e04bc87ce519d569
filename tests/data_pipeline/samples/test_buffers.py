import gc

import numpy as np
import torch

from amfm.data_pipeline.samples.packing import BufferPool


def test_a_block_comes_back_only_when_the_last_view_of_it_is_gone():
    pool = BufferPool()
    block = pool.lend(64)
    block[:] = 7
    row = torch.from_numpy(block.view(np.int64).reshape(2, 4))[1]
    address = block.ctypes.data
    del block
    gc.collect()
    other = pool.lend(64)
    assert other.ctypes.data != address, "a tensor still looks at the first block"
    other[:] = 1
    assert set(row.view(torch.uint8).tolist()) == {7}
    del row
    assert pool.lend(64).ctypes.data == address


def test_a_block_outlives_the_pool_and_another_size_gets_its_own_memory():
    pool = BufferPool()
    small = pool.lend(8)
    small[:] = 3
    large = pool.lend(1000)
    large[:] = 5
    del pool
    gc.collect()
    assert set(small.tolist()) == {3} and len(large) == 1000 and set(large.tolist()) == {5}
