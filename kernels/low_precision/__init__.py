"""Low precision: how a weight is multiplied with operands of 8 or 4 bits, and the formats of those."""
