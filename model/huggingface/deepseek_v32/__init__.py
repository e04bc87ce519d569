"""The transformers class `deepseek_v32`: what it holds and reads, and how it stores weights."""

from amfm.model.huggingface.deepseek_v32.target import CLASS as CLASS
