"""A tracker of amfm that logs a run to MLflow."""
