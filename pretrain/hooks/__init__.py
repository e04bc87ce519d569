"""What a run does besides training: one hook a file, in the order of build.py."""
