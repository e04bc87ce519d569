"""Attention to keys that an indexer chooses."""
