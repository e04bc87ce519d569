"""`amfm bench data`."""
