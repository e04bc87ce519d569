"""Delta rule with gates and several steps a token, as DeltaNet, Gated DeltaNet and DeltaProduct use it."""
