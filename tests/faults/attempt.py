"""One start of a run as forked ranks, of which one can be made to die at a chosen place."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed

from amfm.data_pipeline.config import DataConfig
from amfm.pretrain.failures import describe, exit_code
from amfm.pretrain.train import train
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.tiny_run import tiny_config


@dataclass
class Attempt:
    """The ranks of one start of a run, each a forked process: what they import is in memory already.

    `prepare` is called in each rank with its number, before it trains. A rank that fails ends with the code that `amfm`
    would and leaves its message in `run_dir/error-N.txt`.
    """

    data: DataConfig
    run_dir: Path
    settings: dict[str, Any]
    num_ranks: int
    prepare: Callable[[int], None] | None = None
    pids: list[int] = field(default_factory=list)

    def start(self) -> None:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.store = store
        for rank in range(self.num_ranks):
            pid = os.fork()
            if pid == 0:
                self.be_rank(rank, store.port)
            self.pids.append(pid)

    def be_rank(self, rank: int, port: int) -> None:
        ranks = str(self.num_ranks)
        os.environ.update(RANK=str(rank), WORLD_SIZE=ranks, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=ranks)
        os.environ.update(MASTER_PORT=str(port))
        code = 1
        try:
            if self.prepare is not None:
                self.prepare(rank)
            code = train(tiny_config(self.data, self.run_dir, **self.settings))
        except (RuntimeError, ValueError, OSError) as error:
            code = exit_code(error)
            with suppress(OSError):  # what was done to the rank may have taken folder and descriptors
                self.run_dir.mkdir(exist_ok=True)
                (self.run_dir / f"error-{rank}.txt").write_text(describe(error), encoding="utf-8")
        except BaseException:  # noqa: BLE001 - a bug, whose exit code is 1
            traceback.print_exc()
        finally:
            os._exit(code)

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pids[0], os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def finish(self) -> list[int]:
        """Exit codes (negative: signals) of all ranks, which must come within PATIENCE_SECONDS."""
        deadline, codes = time.monotonic() + PATIENCE_SECONDS, {}
        while len(codes) < len(self.pids):
            assert time.monotonic() < deadline, "a rank outlived the others"
            for pid in self.pids:
                found, status = (0, 0) if pid in codes else os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return [codes[pid] for pid in self.pids]


def die_in(module: Any, name: str, number: int, when: Callable[[], bool]) -> None:
    """This process dies before its call of that number (counted from 0) of a function, once a condition holds."""
    operation, count = getattr(module, name), -1

    def guarded(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += when()
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*arguments, **keywords)

    setattr(module, name, guarded)
