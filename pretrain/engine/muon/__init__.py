"""Muon: an optimizer of whole matrices, whose owners among the data ranks orthogonalise what ZeRO cuts anywhere."""
