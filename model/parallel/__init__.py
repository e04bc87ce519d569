"""How tensors are shared over ranks: groups, shards, parallel layers, context ranks."""
