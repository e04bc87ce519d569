"""Classes of attention and feed-forwards alone: a table of families, and one reader, writer and weight map for all of them."""
