"""What a run does beside training: one hook a file, in the order of build.py."""
