"""A head for ordered numeric bins on amfm's models."""
