"""`amfm study ladder` and `amfm study rate`: losses by size and tokens, and rates by width and depth."""
