"""Changes that nothing can see, or that nothing should: (source, line, before, after) -> why."""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    (
        "data_pipeline/store/store.py",
        'DEFAULT_CACHE = CacheSettings(folder="~/.cache/amfm", max_bytes=64 * 10**9, block_bytes=4 * 2**20)',
        "2",
        "3",
    ): "another size of the blocks that are kept: slower or faster, the same tokens",
    (
        "model/parallel/context.py",
        "state_BHKV = torch.zeros_like(final_ZBHKV[0])",
        "0",
        "1",
    ): "zeros like another segment's state: there are two on every rank, of one shape",
    (
        "model/parallel/context.py",
        "own_2CBLX = torch.empty_like(sent[0])",
        "0",
        "1",
    ): "empty like another rank's part, of one shape",
    (
        "model/moe/by_slot.py",
        'if backend != "triton" or rows_SD.device.type == "cpu":',
        'backend != "triton" or rows_SD.device.type == "cpu"',
        "(True)",
    ): "a GPU alone takes the other branch, which leaves out work on empty slots",
    (
        "pretrain/monitor/corruption.py",
        "CHUNK_ELEMENTS = 1 << 22",
        "22",
        "23",
    ): "another size of the pieces: the same sum of integers",
    (
        "pretrain/monitor/corruption.py",
        "self.layout.engine.wait_for_weights()",
        "self.layout.engine.wait_for_weights()",
        "pass",
    ): "on CPU ranks weights that were gathered meanwhile are there when they are read",
}
