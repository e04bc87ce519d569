"""Tasks of lm-eval, measured on our own model: while it trains, or on a checkpoint."""
