"""Files that survive crashes and other writers: names, atomic writes, locks, line logs, mounts, deletion."""
