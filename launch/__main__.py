"""`amfm` and `python -m amfm.launch`: the command line, with signals answered from its first line on.

Importing PyTorch takes seconds, on a large cluster minutes. A scheduler that announces its time limit in that time must not
kill the ranks by it: `amfm train` notes SIGTERM, SIGUSR1 and SIGHUP until it can save.
"""

import os
import sys

from amfm.launch.rank_command import expand_segments  # its import notes the processors' times as early as can be
from amfm.pretrain.monitor.signals import note_signals


def main() -> None:
    """Import the command line and run it."""
    if sys.argv[1:2] == ["train"]:
        note_signals()
    expand_segments(os.environ)
    try:
        from amfm.launch.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)  # INTERRUPTED of amfm.pretrain.launcher_protocol, which may not be there yet


if __name__ == "__main__":
    main()
