"""The verbs of `amfm bench`."""
