"""`amfm study mixture`: which share of the text each source should get."""
