"""Exit codes and environment variables that launchers and ranks share.

Imports nothing, so that launchers start fast.
"""

from __future__ import annotations

DONE = 0
BAD_INPUT = 2  # settings and files: the same command would be rejected again
RUN_FAILED = 3  # the machine's state: the same command may continue
NEXT_LAYOUT = 4  # saved where another layout begins, or a model without guides: the same command continues, again
INTERRUPTED = 130  # Ctrl-C, as shells count it: a script must not take the run for finished

LAUNCHER_PID = "AMFM_LAUNCHER_PID"  # of launch/cluster/local.py: its ranks end with it
GOES_ON = "AMFM_LAUNCHER_GOES_ON"  # its launcher starts a stage of another layout on as many ranks as that needs
TORCHRUN_RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun itself has started its ranks again
STOPPED_FAILS = "AMFM_STOPPED_FAILS"  # a launcher ends with 3 where a signal stopped a run that has steps left: Kubernetes takes 0 for its end
RESTART_CAUSE = "AMFM_RESTART_CAUSE"  # why the attempt before this one ended; goes into the event log
