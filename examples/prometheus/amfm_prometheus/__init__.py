"""A tracker of amfm that writes the newest metrics of a run for Prometheus."""
