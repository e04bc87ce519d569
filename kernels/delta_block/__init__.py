"""Delta mixers between their projections as one operation."""
