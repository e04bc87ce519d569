"""A tokenizer that ends its process at one text, as a bug in a library would; in a file that Ray's actors can import."""

from __future__ import annotations

import os

from data_pipeline.tokenizer import SentencePieceTokenizer


class DeadlyTokenizer(SentencePieceTokenizer):
    def __init__(self, model: bytes, deadly: str) -> None:
        super().__init__(model)
        self.deadly = deadly

    def __reduce__(self):
        return DeadlyTokenizer, (self.to_bytes(), self.deadly)

    def encode_documents(self, texts):
        if self.deadly in texts:
            os._exit(1)
        return super().encode_documents(texts)
