"""Passes of blocks as CUDA graphs: lists of launches that a GPU replays without the host (docs/design/014)."""
