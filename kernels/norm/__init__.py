"""Root-mean-square norms, plain and gated."""
