"""Tokenizers: SentencePiece, tokenizer.json, tiktoken."""
