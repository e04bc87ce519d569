"""`amfm serve`: a model behind HTTP on this machine."""
