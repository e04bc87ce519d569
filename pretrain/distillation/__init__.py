"""Teachers of distillation: which one it is, and its probabilities, computed with each micro-batch or stored once."""
