"""Run a function on several gloo ranks and bring back what each returned."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from tests.helpers.processes import zygote
from tests.helpers.seeds import seed_all


class RankFailedError(Exception):
    """What a rank raised, with its stack, or which signal ended it."""


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
    try:
        result = function(*arguments)
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))


def run_ranks(function: Callable[..., Any], *arguments: Any, num_ranks: int = 2) -> list[Any]:
    """Call `function(*arguments)` in `num_ranks` fresh processes that find each other as torchrun's ranks do.

    The function must be importable (module level) and its arguments and results picklable. It starts the process group
    itself, as training does (`amfm.pretrain.parallel.initialize_parallel`). Every rank draws by the test's seed. Returns
    the results in rank order; raises the first rank's error. Whatever ends the wait, the test's own time limit too, ends
    the ranks: how long they may take is the test's to say, since if nothing is compiled yet and other programs run it
    is minutes.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[zygote.Forked] = []
        try:
            for rank in range(num_ranks):
                rank_arguments = (rank, num_ranks, store.port, torch.initial_seed(), folder, function, arguments)
                ranks.append(zygote.call(_run_rank, *rank_arguments))
            running = {process.connection: rank for rank, process in enumerate(ranks)}
            while running:
                for connection in wait(list(running)):
                    rank = running.pop(connection)
                    _check(rank, ranks[rank].wait(), Path(folder, f"{rank}.error"))
        finally:
            for process in ranks:
                process.kill()
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(num_ranks)]


def _check(rank: int, code: int, error: Path) -> None:
    if code:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise RankFailedError(f"rank {rank} {how}\n{error.read_text() if error.exists() else ''}")
