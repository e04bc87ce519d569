"""The verbs of `amfm`: signatures and tables; the work is done elsewhere."""
