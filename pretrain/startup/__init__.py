"""Open what a run works with: data, model and log, in the order in which start.py calls them."""
