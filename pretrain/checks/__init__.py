"""What a configuration must fulfil beyond its schema."""
