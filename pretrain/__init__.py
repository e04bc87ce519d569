"""The run: configuration, loop, engine, checkpoints, export."""
