"""A program without amfm: a module of the same names takes weights and AdamW's state by only torch Distributed Checkpoint.

Arguments: the folder, a file of the checkpoint that it was made from, and a folder to write its own state to.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed.checkpoint as dcp
from plain_module import build
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict


def main(folder: str, checkpoint_file: str, out: str) -> None:
    """Load, compare every number with the file, and save."""
    saved = load_file(checkpoint_file)
    metadata = dcp.FileSystemReader(folder).read_metadata()
    prefix, entries = "model.", metadata.state_dict_metadata
    model = build(saved, {name.removeprefix(prefix): entries[name].size for name in entries if name.startswith(prefix)})
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}])
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state)
    for name, parameter in model.named_parameters():
        found = {"weight": parameter.data, **optimizer.state[parameter]}
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(found[kind].flatten(), saved[f"{kind}/{name}/0"]), (kind, name)
        assert int(found["step"]) == 2
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, saved[f"buffer/{name}"]), name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=out)
    assert not any(name.partition(".")[0] == "amfm" for name in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
