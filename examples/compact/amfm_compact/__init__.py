"""The verb `amfm compact`: what pruning set to zero is removed from a model."""
