"""Megatron-Core's distributed checkpoints, read and written, and the names of Megatron-DeepSpeed."""
