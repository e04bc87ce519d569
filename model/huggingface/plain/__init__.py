"""Classes of only attention and feed-forwards: a table of families, and one reader, writer and weight map for all of them."""
