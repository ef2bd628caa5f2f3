"""data.caches."""
