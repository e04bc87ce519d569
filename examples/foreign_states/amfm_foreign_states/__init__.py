"""Training states, weights and moments, in the formats of other programs."""
