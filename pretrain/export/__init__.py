"""Checkpoints for transformers and DeepSpeed, and the way back."""
