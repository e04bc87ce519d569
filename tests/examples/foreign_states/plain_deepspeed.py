"""A program without amfm: a module of the same names under DeepSpeed takes a universal checkpoint, and saves its own.

Arguments: the folder, a file of the checkpoint that it was made from, the stage of ZeRO, and a folder to write to.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import torch

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
# Needed before DeepSpeed, which would wait half a minute for a compiler.
import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from plain_module import build
from safetensors.torch import load_file


def main(folder: str, checkpoint_file: str, stage: str, out: str) -> None:
    """Load, compare every number with the file, and save."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    saved = load_file(checkpoint_file)
    shapes = {
        key.split("/")[1]: torch.load(f"{folder}/global_step2/zero/{key.split('/')[1]}/fp32.pt")["param"].shape
        for key in saved
        if key.startswith("weight/")
    }
    model = build(saved, shapes)
    groups = [
        {"params": [weight for weight in model.parameters() if is_matrix(weight)], "weight_decay": decay}
        for is_matrix, decay in ((partial(has_dims, True), 0.5), (partial(has_dims, False), 0.0))
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(stage)},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": True},
    }
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    _, client_state = engine.load_checkpoint(folder)
    engine.module.load_state_dict(client_state["buffers"], strict=False)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter).flatten(), saved[f"weight/{name}/0"]), name
        for kind in ("exp_avg", "exp_avg_sq"):
            found = safe_get_full_optimizer_state(parameter, kind)
            assert torch.equal(found.flatten(), saved[f"{kind}/{name}/0"]), (kind, name)
    assert engine.global_steps == 2
    engine.save_checkpoint(out)
    assert not any(name.partition(".")[0] == "amfm" for name in sys.modules)


def has_dims(wanted: bool, weight: torch.Tensor) -> bool:
    """Whether a weight is a matrix, or not."""
    return (weight.dim() > 1) == wanted


if __name__ == "__main__":
    main(*sys.argv[1:])
