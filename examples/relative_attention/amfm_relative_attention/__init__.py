"""Attention with learned relative positions as a mixer of amfm."""
