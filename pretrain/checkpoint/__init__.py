"""Checkpoints: saved at once or not at all, verified before they are trusted."""
