"""Names of the environment variables that a launcher sets for its ranks beyond torchrun's; imports nothing, so that a
launcher is quick."""

LAUNCHER_PID = "AMFM_LAUNCHER_PID"  # of launch/cluster/local.py: its ranks end with it
RESTART_CAUSE = "AMFM_RESTART_CAUSE"  # why the attempt before this one ended; goes into the event log
