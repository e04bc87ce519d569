"""The transformers class `gpt_oss`: what it holds and reads, and how it stores weights."""
