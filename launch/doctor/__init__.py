"""`amfm doctor`: what a machine or a cluster has and can run."""
