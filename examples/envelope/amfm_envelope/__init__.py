"""Pruning of whole groups by a k-level envelope as a hook of amfm."""
