"""The model's configuration: patterns, sections, the registry of mixers. Imports no torch."""
