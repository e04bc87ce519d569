"""Cross-entropy of a linear head without the logits in memory."""
