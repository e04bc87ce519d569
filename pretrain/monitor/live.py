"""A panel at the foot of a terminal, redrawn in place four times a second, with remarks scrolling above it.

A terminal that changes its width folds or cuts the lines of the panel that stands, so that no one knows any more how
far up it begins, and every redraw would leave a torn copy. After a change of size the screen is therefore cleared and
the newest remarks are printed again above a fresh panel. The thread that redraws notices it, however long a step takes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live

REDRAWS_A_SECOND = 4
KEPT_REMARKS = 100


class LivePanel:
    """Shows what `draw` returns, from `start` to `close`, on a console that is a terminal. `draw` must be quick."""

    def __init__(self, console: Console, draw: Callable[[], RenderableType]) -> None:
        self.console, self.draw = console, draw
        self._remarks: deque[str] = deque(maxlen=KEPT_REMARKS)
        self._size = console.size
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._redraw_always, name="live-panel", daemon=True)
        self._live = self._open()

    def start(self) -> None:
        """Begin to redraw."""
        self._live.start(refresh=True)
        self._thread.start()

    def print(self, markup: str) -> None:
        """Print a remark above the panel."""
        with self._lock:
            self._remarks.append(markup)
            self.console.print(markup)

    def redraw(self) -> None:
        """Draw the panel now; after a change of the terminal's size on a cleared screen, below the newest remarks."""
        with self._lock:
            if self.console.size == self._size:
                self._live.refresh()
                return
            self._live.stop()
            self._size = self.console.size
            self.console.clear()
            for markup in list(self._remarks)[-self._size.height :]:
                self.console.print(markup)
            self._live = self._open()
            self._live.start(refresh=True)

    def close(self) -> None:
        """Stop redrawing; the last panel stays."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            self._live.stop()

    def _open(self) -> Live:
        return Live(console=self.console, auto_refresh=False, transient=False, get_renderable=self.draw)

    def _redraw_always(self) -> None:
        while not self._closed.wait(1 / REDRAWS_A_SECOND):
            self.redraw()
