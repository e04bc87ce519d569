"""Short causal depthwise convolution with SiLU."""
