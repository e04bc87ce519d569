"""The configuration: schema, files, overrides, errors."""
