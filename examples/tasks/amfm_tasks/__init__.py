"""The verb `amfm tasks`: small tasks of lm-eval from the held-out text of a store."""
