"""models.layering."""
