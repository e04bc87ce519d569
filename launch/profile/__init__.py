"""Where a step's time goes: traces of `train.profile`, read and put to blocks and kinds of work."""
