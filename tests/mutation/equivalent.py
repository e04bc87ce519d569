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
        "pretrain/hooks/state_watch.py",
        "CHUNK_ELEMENTS = 1 << 22",
        "22",
        "23",
    ): "another size of the pieces: the same sum of integers",
    (
        "pretrain/hooks/state_watch.py",
        "if self.at_rest:",
        "self.at_rest",
        "(True)",
    ): "if nothing is noted nothing has changed: a pass over the state for nothing",
    (
        "pretrain/hooks/state_watch.py",
        "self.layout.engine.wait_for_weights()",
        "self.layout.engine.wait_for_weights()",
        "pass",
    ): "on CPU ranks weights that were gathered meanwhile are there when they are read",
    (
        "data_pipeline/store/store.py",
        'DEFAULT_CACHE = CacheSettings(folder="~/.cache/amfm", max_bytes=64 * 10**9, block_bytes=4 * 2**20)',
        "2**20",
        "(2 * 20)",
    ): "another size of the blocks that are kept: slower, the same tokens",
    (
        "pretrain/engine/gradients.py",
        'all_data = groups.dp_cp if axis == "embd" and groups.dp_cp.size() > 2 else None',
        'axis == "embd" and groups.dp_cp.size() > 2',
        "(axis == 'embd' or groups.dp_cp.size() > 2)",
    ): "more is summed over data ranks here, one of which hands the sum on: the same sum",
    (
        "pretrain/engine/gradients.py",
        'all_data = groups.dp_cp if axis == "embd" and groups.dp_cp.size() > 2 else None',
        "2",
        "3",
    ): "gloo's three ranks add up in one order at both ends; those of GPUs may not",
    (
        "pretrain/checkpoint/load.py",
        "if manifest is None or problems:",
        "manifest is None or problems",
        "(problems)",
    ): "if there is no manifest there is a problem",
    (
        "pretrain/engine/gradients.py",
        "if excess > 1:",
        "excess > 1",
        "(excess >= 1)",
    ): "gradients whose norm is the limit are multiplied by 1",
    (
        "model/moe/by_rank.py",
        "if room is not None and room.is_open:",
        "room is not None and room.is_open",
        "(room is not None)",
    ): "what passes outside of a step note is gone when a step's begin",
    (
        "pretrain/engine/grad_norm.py",
        "numel = max(0, min(length, parameter.ds_numel - start))",
        "0",
        "1",
    ): "a rank that has nothing of a parameter counts a number of its padding, which is zero",
    (
        "launch/plan/memory.py",
        "expert_gradients = e * held.routed / max(1, stored) if is_apart else 0.0",
        "0.0",
        "1.0",
    ): "one byte of an estimate",
    (
        "pretrain/export/verify.py",
        'job["export"], trust_remote_code=job["remote_code"], local_files_only=True',
        "True",
        "False",
    ): "what is read is a folder, and a folder is read where it is",
}
