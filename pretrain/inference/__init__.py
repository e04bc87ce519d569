"""Use of trained weights: evaluation and generation."""
