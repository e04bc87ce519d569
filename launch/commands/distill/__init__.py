"""Verbs `amfm distill ...`."""
