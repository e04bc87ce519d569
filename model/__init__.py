"""HybridModel: blocks of a pattern string, on Megatron-core's parallel layers and our kernels."""

if __name__ != "amfm.model":
    raise ImportError("model is imported as amfm.model")
