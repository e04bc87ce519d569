"""The plain PyTorch form of `{window_linear}`, which an own export carries; it imports only amfm's modeling files."""
