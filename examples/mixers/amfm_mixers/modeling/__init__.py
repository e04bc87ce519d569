"""Plain PyTorch forms of the mixers, which an own export carries; they import only amfm's modeling files."""
