"""HybridModel: blocks of a pattern string, on Megatron-core's parallel layers and our kernels."""
