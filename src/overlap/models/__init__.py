"""Model programs, and loading their weights."""
