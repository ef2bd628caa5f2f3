"""data.checks."""
