"""How tensors are shared over ranks: groups, shards, parallel layers, context ranks."""

from amfm.model.parallel.lean_import import import_lean

import_lean()
