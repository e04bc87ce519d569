"""Recurrence with a decay of each channel and state number, as Mamba (S6) uses it."""

from amfm_mixers.diag_scan.op import diag_scan as selective_scan

__all__ = ["selective_scan"]
