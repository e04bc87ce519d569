"""Pretraining of hybrid language models. In a clone the packages here are links to the folders at its root."""

__version__ = "0.1.0"
