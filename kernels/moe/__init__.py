"""Mixture of experts: routing, grouping, feed-forward."""
