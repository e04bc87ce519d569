"""Capturing launches on a GPU.

One pool of memory serves all graphs of a model: what a graph lets go of while it is captured, those captured after it use
again. So graphs must be replayed in the order in which they were captured, forward passes first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch


class Capture(Protocol):
    """Runs a function while what it launches is recorded, and gives what launches the same again."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches. On a GPU nothing is computed yet."""
        ...


class CudaCapture:
    """Captures on a stream of its own, from which all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        # Whatever Python would free in the middle of a capture, such as an event, is freed before.
        torch.cuda.synchronize(device)
        gc.collect()
        torch.cuda.empty_cache()
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches, in backward passes also from autograd's own thread.

        Raises RuntimeError where it reads a number from the device, or does something else that no graph holds.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            # Other threads, such as NCCL's, may continue to ask the device for what they like.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # which only says that something failed before
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay
