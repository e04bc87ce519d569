"""Loss on held-out text by processor seconds: amfm next to peers in transformers and torch, on the same text and tokens."""
