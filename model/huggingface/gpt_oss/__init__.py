"""The transformers class `gpt_oss`: what it holds and reads, and how it stores weights."""

from amfm.model.huggingface.gpt_oss.target import CLASS as CLASS
