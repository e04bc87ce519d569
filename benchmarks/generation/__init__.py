"""Tokens of a text and of a prompt per second on processors: ours, transformers, llama.cpp."""
