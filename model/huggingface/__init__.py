"""Maps between our weights and those of transformers' classes."""
