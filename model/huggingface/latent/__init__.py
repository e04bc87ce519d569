"""What the transformers classes `kimi_linear`, `deepseek_v3` and `deepseek_v32` share: layers with latent attention, and their weights."""
