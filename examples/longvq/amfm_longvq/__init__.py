"""Attention over a codebook, after LongVQ, as a mixer of amfm."""
