"""Plain PyTorch forms of the mixers, which an own export carries; they import amfm's modeling files alone."""
