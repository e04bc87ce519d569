"""Run a function on several gloo ranks and bring back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from tests.helpers.seeds import seed_all

# Imported once, by the process from which all ranks are forked, before it has threads: a rank then starts in a moment.
PRELOADED = ["amfm.pretrain.train", "tests.helpers.frozen"]


def _run_rank(
    rank: int, num_ranks: int, port: int, seed: int, folder: str, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    seed_all(seed)
    result = function(*arguments)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))


def run_ranks(function: Callable[..., Any], *arguments: Any, num_ranks: int = 2) -> list[Any]:
    """Call `function(*arguments)` in `num_ranks` fresh processes that find each other as torchrun's ranks do.

    The function must be importable (module level) and its arguments and results picklable. It starts the process group
    itself, as training does (`amfm.pretrain.parallel.initialize_parallel`). Every rank draws by the test's seed. Returns
    the results in rank order; raises the first rank's error. Whatever ends the wait, the test's own time limit too, ends
    the ranks: how long they may take is the test's to say, since where nothing is compiled yet and other programs run it
    is minutes.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = torch.multiprocessing.start_processes(
            _run_rank,
            (num_ranks, store.port, torch.initial_seed(), folder, function, arguments),
            nprocs=num_ranks,
            join=False,
            start_method="forkserver",
        )
        try:
            while not context.join(timeout=1.0):  # short: between looks
                pass
        finally:
            for process in context.processes:
                process.kill()
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(num_ranks)]
