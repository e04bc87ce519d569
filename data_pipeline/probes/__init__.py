"""Synthetic tasks with known answers: what a model remembers, copies and tracks. numpy only, for reading processes."""
