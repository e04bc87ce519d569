"""Low-rank tensor updates of stacked experts on amfm's models."""
