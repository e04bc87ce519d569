"""Replicas: the newest state in the memory of two nodes, for a start after a failure."""
