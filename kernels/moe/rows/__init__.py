"""Rows of tokens by choice, as experts over ranks exchange them."""
