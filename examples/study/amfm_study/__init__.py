"""`amfm study`: grids of small models, compared."""
