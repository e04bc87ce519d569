"""A panel at the foot of a terminal, redrawn in place four times a second, with warnings scrolling above it.

A terminal that changes its width folds or cuts the lines of the panel that stands, so that no one knows any more how
far up it begins, and every redraw would leave a torn copy. After a change of size the screen is therefore cleared and
the newest warnings are printed again above a fresh panel. The thread that redraws notices it, however long a step takes.

Progress display: a live panel on a terminal, plain lines anywhere else, all on standard error.

Standard output belongs to results, which other programs read. A log file of a cluster job gets a line every
`log_every_steps` steps, without control characters; a terminal gets a panel that is redrawn in place, with warnings
scrolling above it. Both show the same numbers, those of metrics.jsonl, and the display keeps nothing that a run needs.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape

from amfm.data_pipeline.terminal import printable
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.monitor.panel import RunState, choose_bars, plural
from amfm.pretrain.monitor.signals import ON_INTERRUPT
from amfm.pretrain.stages import total_steps

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
        """Print a warning above the panel."""
        with self._lock:
            self._remarks.append(markup)
            self.console.print(markup)

    def redraw(self) -> None:
        """Draw the panel now; after a change of the terminal's size on a cleared screen, below the newest warnings."""
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


class Display:
    """Shows the steps of one start of a run; exists only on the main rank.

    `first_step`: steps that were done before. `shows_mfu`: whether the peak of the devices is known (panel.py).
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        first_step: int,
        last_step: int,
        shows_mfu: bool = True,
        console: Console | None = None,
    ) -> None:
        self.config = config
        # A notebook's standard error calls itself a terminal, and each redraw would be one more output below the cell.
        is_terminal = False if Console().is_jupyter else None
        self.console = console or Console(
            file=sys.stderr, highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=is_terminal
        )
        name = config.run.name or config.run.dir.rstrip("/").rsplit("/", 1)[-1]
        self.state = RunState(f"amfm train {name}", first_step=first_step, last_step=last_step, began=time.time())
        self.state.shows_mfu = shows_mfu
        self.state.num_steps, self.state.bars = total_steps(config), choose_bars(self.console.encoding)
        if first_step:  # it resumed, so its checkpoint stands; how old that is, is not known here
            self.state.checkpoint_step = first_step
        self.live: LivePanel | None = None
        if self.console.is_interactive:  # a terminal that is not TERM=dumb
            self.live = LivePanel(self.console, lambda: self.state.draw(self.console.width))
            self.live.start()

    def say(self, text: str) -> None:
        """Print a warning between steps; on a terminal it scrolls above the panel."""
        printer = self.live or self.console
        printer.print(escape(printable(text)))

    def show(self, metrics: dict[str, Any]) -> None:
        """Show a step's line of metrics.jsonl: update the panel, or print a line if one is due."""
        self.state.take_metrics(metrics)
        if self.live is not None:
            self.live.redraw()
        elif self.state.is_line_due(metrics, self.config.train.log_every_steps):
            self.console.print(escape(self.state.format_line(metrics)))

    def answer_interrupt(self) -> None:
        """Report what a first Ctrl-C does and what a second one would lose; from a separate thread."""
        self.say(ON_INTERRUPT.format(lost=plural(self.state.steps_at_stake(), "step")))

    def show_checkpoint(self, step: int) -> None:
        """Show that the checkpoint of a step stands since now."""
        self.state.take_checkpoint(step, time.time())

    def close(self) -> None:
        """Stop updating; the last panel stays on the terminal."""
        if self.live is not None:
            self.live.close()
