"""What a run does besides training: hooks by subject; build.py has their order."""
