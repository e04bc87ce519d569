"""Causal grouped-query attention inside documents."""
