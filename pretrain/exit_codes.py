"""What a process of amfm ends with; imports nothing, so that a launcher is quick."""

DONE = 0
BAD_INPUT = 2  # settings and files: the same command would be refused again
RUN_FAILED = 3  # the machine's state: the same command may go on
