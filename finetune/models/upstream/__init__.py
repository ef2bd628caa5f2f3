"""models.upstream."""
