"""`amfm init`: a first configuration from a size, a style, text and hardware."""
