"""Delta rule with gates and several steps per token, as DeltaNet, Gated DeltaNet and DeltaProduct use it."""
