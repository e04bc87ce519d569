"""The token store: manifest, shards, part files, caches."""
