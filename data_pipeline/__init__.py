"""Text to a verified token store, and the store to resumable packed batches."""

if __name__ != "amfm.data_pipeline":
    raise ImportError("data_pipeline is imported as amfm.data_pipeline")
