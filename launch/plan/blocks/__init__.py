"""What a step costs in each kind of block: by its kind where that is known, else as one that is built says."""
