"""S4D as a mixer of amfm."""
