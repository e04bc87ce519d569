"""Ranks found while training low-rank layers, on amfm's models."""
