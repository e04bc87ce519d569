"""What a step costs in each kind of block: one file per kind, and one for all kinds that have none."""
