"""Text to a verified token store, and the store to resumable packed batches."""
