"""What the transformers classes `kimi_linear` and `deepseek_v3` share: layers with latent attention, and their weights."""
